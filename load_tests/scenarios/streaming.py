"""Streaming completions: every user reads one to its end and asks for the next."""

from dape_load.locust_user import MeasuredUser
from dape_load.workload import STREAMING


class StreamingUser(MeasuredUser):
    """Streams completions."""

    kinds = STREAMING
