"""Several engines behind one server, as replicas of a Ray Serve deployment; needs the extra `ray`."""

import os

# Before Ray is imported. Nothing is sent to its makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The log of a worker comes through Ray, which is to leave its lines as they are.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_COLOR_PREFIX", "0")
# Ray would run the engines at the lowest priority but four.
os.environ.setdefault("RAY_worker_niceness", "0")
