"""Soak: chat and scoring at a steady pace for hours, some of it given up; what counts is what grows."""

import random
from dataclasses import replace

from locust import constant_pacing

from dape_load.locust_user import MeasuredUser
from dape_load.workload import STEADY
from dape_server.load.client import Request

PACE_SECONDS = 2
IMPATIENT, PATIENCE_SECONDS = 0.1, 0.5
"""Share of the requests that are given up where they are not answered by then, and the longest they wait."""


class SteadyUser(MeasuredUser):
    """One request every two seconds, or as soon as the one before has ended."""

    kinds = STEADY
    wait_time = constant_pacing(PACE_SECONDS)

    def next(self) -> Request:
        """Return a request, seldom one that is given up."""
        request = super().next()
        if random.random() < IMPATIENT:
            return replace(request, patience=random.uniform(0.001, PATIENCE_SECONDS))
        return request
