"""Ten times the users for a few seconds: what is too much is refused at once, and forgotten soon after."""

from typing import Any

from locust import LoadTestShape

from dape_load.locust_user import MeasuredUser
from dape_load.workload import CHAT, SPIKE


class ChattingUser(MeasuredUser):
    """Streams short chat-like completions; when refused, it waits as long as it is told to."""

    kinds = CHAT


class Spike(LoadTestShape):
    """--users, then ten times as many, then --users again until --run-time is over."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Return how many users there are now and how many start a second; None at the end."""
        options: Any = self.runner.environment.parsed_options
        now, users = self.get_run_time(), options.num_users or 1
        if options.run_time and now > options.run_time:
            return None
        spiked = 0 <= now - options.spike_after < options.spike_seconds
        users = SPIKE * users if spiked else users
        return users, users
