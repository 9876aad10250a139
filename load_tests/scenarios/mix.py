"""70 % short chat-like completions, 20 % scoring of long texts, 10 % generation after long prompts."""

from dape_load.locust_user import MeasuredUser
from dape_load.workload import MIX


class MixedUser(MeasuredUser):
    """Draws every request anew."""

    kinds = MIX
