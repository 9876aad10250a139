"""Abort storm: half of the users hang up at a random time, before the first token or in the midst of them."""

import random
from dataclasses import replace

from dape_load.locust_user import RECORDS, MeasuredUser
from dape_load.workload import STREAMING
from dape_server.load.client import Request

FIRST_PATIENCE_SECONDS = 1.0


class StayingUser(MeasuredUser):
    """Reads its completions to the end."""

    kinds = STREAMING


class LeavingUser(MeasuredUser):
    """Hangs up on every request that is not answered by then."""

    kinds = STREAMING

    def next(self) -> Request:
        """Return a request with less patience than the last whole answer took."""
        whole = (record.ended - record.sent for record in reversed(RECORDS) if record.succeeded)
        patience = random.uniform(0.001, next(whole, FIRST_PATIENCE_SECONDS))
        return replace(super().next(), patience=patience)
