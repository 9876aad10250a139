"""What the ranks have in common: which keys each holds, and the group they talk in."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from dape_kernels.paged import KeyShard

HOST = "127.0.0.1"
STRIPE_TOKENS = 64
"""Adjacent keys of a sequence that a rank holds: what the C++ kernels read in one go."""
COLLECTIVE_TIMEOUT = timedelta(minutes=5)
"""Longest wait for another rank inside a step."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step, those of each sequence adjacent, in plain numbers."""

    token_ids: list[int]
    counts: list[int]
    """Rows of each sequence."""
    context_lens: list[int]
    """Tokens of each sequence, its rows included."""
    blocks: list[list[int]]
    """Of each sequence, as the scheduler counts them."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The next layers of a pass."""

    number: int
    """Of the pass."""
    count: int


Order = Rows | Layers
"""What all ranks do next: begin a pass, or take one further."""


class Ranks:
    """The processes that hold a sequence together, seen from one of them."""

    def __init__(self, rank: int, size: int, block_size: int):
        self.shard = KeyShard(rank, size, -(-STRIPE_TOKENS // block_size))

    def meet(self, port: int) -> None:
        """Join the group of all ranks where rank 0 waits for them; returns when all are there."""
        self._join(distributed.TCPStore(HOST, port))  # type: ignore[attr-defined]

    def _join(self, store: distributed.TCPStore) -> None:  # type: ignore[name-defined]
        # All ranks are on this machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=self.shard.rank,
            world_size=self.shard.ranks,
            timeout=COLLECTIVE_TIMEOUT,
        )

    def smallest(self, number: int) -> int:
        """Return the smallest of the numbers that all ranks call this with."""
        least = torch.tensor(number)
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        return int(least)

    def together(self, order: Order) -> AbstractContextManager[None]:  # noqa: ARG002
        """Do in the context what all ranks do; here it is known from the one that gives the orders."""
        return nullcontext()

    def close(self) -> None:
        """Leave the group."""
        if distributed.is_initialized():
            distributed.destroy_process_group()


def spread_blocks(tables: Tensor, shard: KeyShard) -> Tensor:
    """Return block tables of cache blocks, given those of the scheduler's blocks, int32 [S, blocks].

    The scheduler's block v is one stripe of every rank, and lies in the same cache blocks on each.
    """
    blocks = tables[:, :, None, None] * shard.stripe + torch.arange(shard.stripe, dtype=tables.dtype)
    return blocks.expand(-1, -1, shard.ranks, -1).reshape(len(tables), -1)
