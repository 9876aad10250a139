"""The definition behind the backend interface: gathers each sequence and materialises its scores.

Slow and quadratic in memory, so it serves tests and a look at single query rows. Letters: T rows of a
batch, H heads, d head size, N keys.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from dape_kernels.backend import LayerCache
from dape_kernels.encoding import Encoding
from dape_kernels.head_major import HeadMajorBackend, HeadMajorCache
from dape_kernels.paged import RaggedBatch
from dape_kernels.reference import causal, reference_scores


class ReferenceBackend(HeadMajorBackend):
    """Plain attention, one sequence after another."""

    name = "reference"

    @torch.no_grad()
    def attend(
        self,
        query: Tensor,
        cache: HeadMajorCache,
        batch: RaggedBatch,
        encoding: Encoding,
        workspace: int,  # noqa: ARG002 (takes what it needs)
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output [T, H, d] and the log-sum-exp [T, H]; see `paged_attention`."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        output, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=dtype)
        for sequence, length in enumerate(batch.context_lens):
            rows = slice(*batch.query_starts[sequence : sequence + 2])
            key, value, segments = _context(cache, batch, sequence, length, dtype)
            scores = causal(reference_scores(_heads_first(query[rows], dtype), key, encoding, segments))
            if batch.shard is not None:
                elsewhere = ~batch.shard.holds(torch.arange(length, device=key.device) // batch.block_size)
                scores = scores.masked_fill(elsewhere, -torch.inf)
                value = value.masked_fill(elsewhere[:, None], 0.0)
            logarithms = scores.logsumexp(-1)
            weights = scores.softmax(-1).masked_fill(logarithms.isneginf()[..., None], 0.0)
            output[rows] = (weights @ value)[0].transpose(0, 1).to(query.dtype)
            lse[rows] = logarithms[0].t()
        return output, lse


@dataclass(frozen=True, slots=True)
class RowScores:
    """What one query sees of each key up to its own position. All [H, N]."""

    scores: Tensor  # A, scaled
    static_bias: Tensor  # B
    adapted_bias: Tensor  # the final score less A: B + f(A, B), or what CoPE adds


@torch.no_grad()
def row_scores(
    query: Tensor, cache: LayerCache, batch: RaggedBatch, encoding: Encoding, row: int
) -> RowScores:
    """Return the scores and biases of one row of a batch, in the definition's arithmetic.

    Args:
        query: [T, H, d], rotated already where the encoding is rotary.
        cache: of any backend, with the keys of the row's sequence.
        batch: the batch of the row.
        encoding: the layer's score function.
        row: 0 to T - 1.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    sequence = bisect_right(batch.query_starts, row) - 1
    position = batch.positions(sequence)[row - batch.query_starts[sequence]]
    # The official rule zeroes hidden columns after the last key, so it needs to see how near that is.
    beyond = 0 if encoding.dape is None else encoding.dape.kernel // 2
    length = min(position + 1 + beyond, batch.context_lens[sequence])
    rows = _heads_first(query[row : row + length - position], dtype)
    key, _, segments = _context(cache, batch, sequence, length, dtype)
    visible = slice(position + 1)
    final = reference_scores(rows, key, encoding, segments)[0, :, 0, visible]
    scores = (rows[:, :, :1] @ key.transpose(-1, -2) * encoding.scale)[0, :, 0, visible]
    place = torch.arange(position + 1, device=query.device) if segments is None else segments[0, visible]
    return RowScores(scores, encoding.static_bias(place[-1:], place).to(dtype), final - scores)


def _heads_first(query: Tensor, dtype: torch.dtype) -> Tensor:
    return query.to(dtype).transpose(0, 1)[None]


def _context(
    cache: LayerCache, batch: RaggedBatch, sequence: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the first `length` keys and values [1, H, length, d] of a sequence, and segments [1, length]."""
    device = batch.block_tables.device
    slots = batch.key_slots(torch.tensor(sequence, device=device), torch.arange(length, device=device))
    key, value = cache.read(slots)
    segments = None if batch.segments is None else batch.segments[slots][None]
    return key.to(dtype)[None], value.to(dtype)[None], segments
