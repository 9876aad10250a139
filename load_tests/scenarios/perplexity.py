"""Scoring: every user has one text scored after another."""

from dape_load.locust_user import MeasuredUser
from dape_load.workload import SCORING


class ScoringUser(MeasuredUser):
    """Scores texts."""

    kinds = SCORING
