"""Which replica a prompt goes to: one that has a part of it in its prefix cache, unless that is busy.

Pure bookkeeping, without Ray: replicas are names. What a replica has in its cache is guessed from what was
sent there; a wrong guess costs time, never a wrong answer.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from dape_engine.cache import extend_block_keys
from dape_engine.request import GenerationRequest, ScoreRequest
from dape_server.replicas.order import Request

MAX_BLOCKS = 256
"""Blocks of a prompt, from its beginning, that are looked at."""
MAX_KEYS = 1 << 17
"""Blocks remembered, the least recently sent ones forgotten; a hundred bytes each."""
LEAST_SHARE = 0.25
"""Share of a prompt that a replica must have: less is computed sooner than it is waited for."""


def prompt_keys(request: Request, block_size: int) -> list[bytes]:
    """Return the keys of the full blocks at the beginning of a prompt, as the prefix cache has them."""
    if isinstance(request, GenerationRequest):
        tokens = request.prompt
    elif isinstance(request, ScoreRequest):
        tokens = request.token_ids[request.windows[0].start : request.windows[0].end]
    else:
        tokens = request.token_ids[: request.query + 1]
    keys: list[bytes] = []
    count = min(len(tokens) // block_size, MAX_BLOCKS)
    extend_block_keys(keys, tokens, block_size, count, request.scheduling.cache_salt)
    return keys


class PrefixTable:
    """Who was sent which prefix last.

    Args:
        capacity: blocks remembered.
    """

    def __init__(self, capacity: int = MAX_KEYS):
        self._capacity = capacity
        self._owners: OrderedDict[bytes, str] = OrderedDict()

    def owner(self, keys: Sequence[bytes], replicas: Mapping[str, int]) -> str | None:
        """Return the one of `replicas` that was sent the longest beginning, if that is worth going there."""
        for length in range(len(keys), 0, -1):
            if length < LEAST_SHARE * len(keys):
                return None
            if (owner := self._owners.get(keys[length - 1])) in replicas:
                return owner
        return None

    def note(self, keys: Sequence[bytes], replica: str) -> None:
        """Remember that a prompt was sent to a replica."""
        for key in keys:
            self._owners[key] = replica
            self._owners.move_to_end(key)
        while len(self._owners) > self._capacity:
            self._owners.popitem(last=False)


def preference(
    keys: Sequence[bytes], loads: Mapping[str, int], table: PrefixTable, slack: int
) -> list[list[str]]:
    """Return ranks of replicas; within a rank the one with the least to do is taken.

    First the prompt's own replica, where it has at most `slack` requests more than the least busy one; then
    two of all, chosen by chance: the power of two choices, which keeps queues short.

    Args:
        keys: of the prompt.
        loads: requests at work or waiting of every replica that may be chosen.
        table: of what was sent where.
        slack: requests.
    """
    two = random.sample(sorted(loads), min(2, len(loads)))
    owner = table.owner(keys, loads)
    if owner is None or loads[owner] - min(loads.values()) > slack:
        return [two]
    return [[owner], two]
