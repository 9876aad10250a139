"""The routing of `dape_server.replicas.routing` as Ray Serve asks for it, where requests are sent from."""

from __future__ import annotations

from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from dape_server.replicas.order import Order
from dape_server.replicas.routing import PrefixTable, preference, prompt_keys


class PrefixRouter(RequestRouter):
    """Chooses a replica for every order, and any replica for all else."""

    def initialize_state(self, block_size: int, slack: int) -> None:
        """Take the settings of the deployment: tokens of a cache block, and the slack of `preference`."""
        self._block_size = block_size
        self._slack = slack
        self._table = PrefixTable()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return ranks of replicas."""
        order = _order(pending_request)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if order is not None:
            replicas = {n: r for n, r in replicas.items() if n not in order.avoid} or replicas
        # A replica of which nothing was heard for a while has got nothing from here.
        loads = {n: self.replica_queue_len_cache.get(r.replica_id) or 0 for n, r in replicas.items()}
        ranks = preference(self._order_keys(order), loads, self._table, self._slack)
        return [[replicas[name] for name in rank] for rank in ranks]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, _result: ReplicaResult
    ) -> None:
        """Remember where a prompt has gone."""
        order = _order(pending_request)
        self._table.note(self._order_keys(order), replica_id.unique_id)

    def _order_keys(self, order: Order | None) -> Sequence[bytes]:
        return [] if order is None else prompt_keys(order.request, self._block_size)


def _order(pending: PendingRequest | None) -> Order | None:
    """Return the order that a call carries, if any."""
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, Order) else None
