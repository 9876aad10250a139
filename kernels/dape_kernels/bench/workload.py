"""What is measured: layers with random weights, filled caches, and calls of the backends on them.

Letters: H heads, d head size, D width of DAPE, N tokens, R query rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from dape_kernels.backend import Backend, LayerCache
from dape_kernels.bias import KerpleLog
from dape_kernels.encoding import Encoding, dape_from_parameters
from dape_kernels.paged import RaggedBatch

BLOCK_SIZE = 16
WORKSPACE = 64 << 20
CPU = torch.device("cpu")
FILL_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention layer."""

    heads: int = 12
    head_dim: int = 64
    width: int = 32

    def flops(self, *, dape: bool) -> int:
        """Return the multiplications and additions of one (query, key) pair over all heads.

        Those of the products alone: q k and the weighted sum of v, and DAPE's two layers applied to the
        scores. Exponentials, tables and masks are overhead.
        """
        return 4 * self.heads * (self.head_dim + (self.width if dape else 0))

    def tensors(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return random queries, keys and values [N, H, d] in float32, with nothing beside them in memory."""
        query, key, value = (torch.empty(tokens, self.heads, self.head_dim).normal_() for _ in range(3))
        return query, key, value

    def encoding(
        self,
        *,
        dape: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        taps: int = 1,
    ) -> Encoding:
        """Return Kerple, or DAPE-Kerple, with random parameters of the size that training begins with.

        The parameters have the same values in every call, whatever their `dtype`. `taps` is the length of
        DAPE's kernel.
        """
        generator = torch.Generator().manual_seed(0)

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return (low + (high - low) * torch.rand(size, generator=generator)).to(device, dtype)

        bias = KerpleLog(uniform(0, 2, self.heads), uniform(0, 1, self.heads))
        if not dape:
            return Encoding(self.heads, self.head_dim, bias)
        first, second = 1 / math.sqrt(2 * self.heads * taps), 1 / math.sqrt(self.width * taps)
        network = dape_from_parameters(
            "concat_residual",
            uniform(-first, first, self.width, 2 * self.heads, 1, taps),
            uniform(-first, first, self.width),
            uniform(-second, second, self.heads, self.width, 1, taps),
            uniform(-second, second, self.heads),
        )
        return Encoding(self.heads, self.head_dim, bias, network)


def pairs(tokens: int) -> int:
    """Return the number of (query, key) pairs of N tokens that attend to themselves and what is before."""
    return tokens * (tokens + 1) // 2


def fill(backend: Backend[Any], key: Tensor, value: Tensor, dtype: torch.dtype) -> LayerCache:
    """Return a cache of one layer that holds the keys and values [N, H, d] of one sequence."""
    tokens, heads, head_dim = key.shape
    blocks = -(-tokens // BLOCK_SIZE)
    cache: LayerCache = backend.cache.allocate(blocks, BLOCK_SIZE, heads, head_dim, dtype, CPU)
    for start in range(0, tokens, FILL_ROWS):
        slots = torch.arange(start, min(start + FILL_ROWS, tokens))
        rows = slice(start, start + len(slots))
        cache.write(key[rows], value[rows], slots)
    return cache


def attention(
    backend: Backend[Any], caches: list[LayerCache], query: Tensor, tokens: int, encoding: Encoding
) -> Callable[[], Tensor]:
    """Return a call that computes the last R rows of N tokens, with each of the caches in turn.

    Args:
        backend: whose caches they are.
        caches: of `fill`, as many as there are layers to visit.
        query: [R, H, d]; bfloat16 queries ask for bfloat16 products.
        tokens: N.
        encoding: the layer's score function.
    """
    blocks = -(-tokens // BLOCK_SIZE)
    tables = torch.arange(blocks, dtype=torch.int32)[None]
    batch = RaggedBatch([0, len(query)], [tokens], tables, BLOCK_SIZE)
    prepared = backend.prepare(encoding, tokens, CPU)
    turns = cycle(caches)

    def attend() -> Tensor:
        output: Tensor = backend.attend(query, next(turns), batch, prepared, WORKSPACE)[0]
        return output

    return attend
