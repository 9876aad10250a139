"""The CHE benchmark: can a model that learned a rule on short strings follow it on long ones?"""
