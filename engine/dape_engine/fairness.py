"""How much each tenant has received, so that tenants share the engine evenly whatever they ask for."""

from __future__ import annotations

from collections.abc import Collection

MAX_IDLE_TENANTS = 4096
"""Tenants without work whose account is kept."""
KEYS_PER_ROW = 2048
"""Keys that cost as much to attend to as the rest of one row of a model."""


def cost(start: int, count: int) -> float:
    """Return the cost of rows start to start + count of a sequence, in rows with few keys."""
    return count + count * (2 * start + count + 1) / 2 / KEYS_PER_ROW


class FairShares:
    """Start-time fair queueing: the tenant that has received least goes first.

    What a tenant did not use while it had no work is not kept for later: who comes back starts level with
    the tenant served last.
    """

    def __init__(self) -> None:
        self._received: dict[str, float] = {}
        self._level = 0.0

    def received(self, tenant: str) -> float:
        """Return what a tenant has received, in cost units; comparable between tenants that have work."""
        return self._received.get(tenant, self._level)

    def join(self, tenant: str, active: Collection[str]) -> None:
        """Open the account of a tenant that had no work until now.

        Args:
            tenant: the newcomer.
            active: tenants that have work; where there is none, old accounts mean nothing any more.
        """
        if not active:
            self._received.clear()
            self._level = 0.0
        elif len(self._received) > MAX_IDLE_TENANTS + len(active):
            self._received = {known: self._received[known] for known in active if known in self._received}
        self._received[tenant] = max(self.received(tenant), self._level)

    def charge(self, tenant: str, amount: float) -> None:
        """Note that a tenant was served."""
        received = self.received(tenant)
        self._level = max(self._level, received)
        self._received[tenant] = received + amount
