"""Soak: chat and scoring at a steady pace for hours; what counts are the slopes of memory and open files."""

from locust import constant_pacing

from dape_load.locust_user import MeasuredUser
from dape_load.workload import STEADY

PACE_SECONDS = 2


class SteadyUser(MeasuredUser):
    """One request every two seconds, or as soon as the one before has ended."""

    kinds = STEADY
    wait_time = constant_pacing(PACE_SECONDS)
