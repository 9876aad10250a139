"""The backend: online softmax over the tiles of every group of a batch.

Letters: T rows of the batch, H heads, d head size, G lanes of a group, R rows of a lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dape_kernels.chunked.plan import Budget, Group, make_groups
from dape_kernels.chunked.score import Scratch, cost, make_scorer, reach
from dape_kernels.chunked.tile import Tile
from dape_kernels.chunked.workers import count_workers, for_each
from dape_kernels.encoding import Encoding
from dape_kernels.head_major import HeadMajorBackend, HeadMajorCache
from dape_kernels.paged import RaggedBatch

# Exponents below this are raised to it. The weights, at most 2e-28 of the largest, change no result, while
# subnormal ones would make exponentials and matrix products 100 times slower.
LOWEST_EXPONENT = -64.0


class ChunkedBackend(HeadMajorBackend):
    """Attention in a workspace that does not grow with the length."""

    name = "chunked"

    @torch.no_grad()
    def attend(
        self, query: Tensor, cache: HeadMajorCache, batch: RaggedBatch, encoding: Encoding, workspace: int
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output [T, H, d] and the log-sum-exp [T, H]; see `paged_attention`.

        Computes in float32 (float64 for float64 queries), whatever the dtype of the cache.
        """
        longest = max(batch.context_lens)
        if encoding.tables is None or encoding.tables.residual.shape[1] < longest:
            encoding = encoding.with_tables(longest, query.device)
        dtype = torch.promote_types(query.dtype, torch.float32)
        workers = count_workers(query.device, workspace)
        budget = _budget(cache, encoding, dtype, workspace // workers)
        groups = batch.memo(budget, lambda: make_groups(batch, budget))
        # One row more than the batch has: what the places of a group without a row compute goes there.
        size, heads, _ = query.shape
        # Rows of which no key is here may be in no group.
        output = query.new_zeros(size + 1, *query.shape[1:])
        lse = query.new_full((size + 1, heads), -torch.inf, dtype=dtype)

        @torch.inference_mode(torch.is_inference_mode_enabled())  # a property of the thread
        @torch.no_grad()
        def compute(group: Group) -> None:
            values, logarithms = _attend_group(query, cache, group, encoding, dtype)
            output.index_copy_(0, group.targets, values.to(query.dtype))
            lse.index_copy_(0, group.targets, logarithms)

        for_each(workers, compute, groups)
        return output[:size], lse[:size]


def _budget(cache: HeadMajorCache, encoding: Encoding, dtype: torch.dtype, workspace: int) -> Budget:
    numbers, size = cost(encoding), dtype.itemsize
    # Keys and values of another dtype are gathered before they are converted.
    gathered = 0 if cache.key.dtype == dtype else cache.key[:, :1].nbytes
    return Budget(
        workspace=workspace,
        per_row=numbers.row * size,
        per_key=numbers.key * size + gathered,
        per_pair=numbers.pair * size,
        reach=reach(encoding),
        device=cache.key.device.type,
    )


def _attend_group(
    query: Tensor, cache: HeadMajorCache, group: Group, encoding: Encoding, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the output [G * R, H, d] and the log-sum-exp [G * R, H] of one group."""
    heads, lanes, rows = encoding.heads, group.lanes, group.rows
    scratch = Scratch(dtype, query.device)
    scaled = query[group.sources].to(dtype).mul_(encoding.scale).transpose(0, 1).contiguous()
    scorer = make_scorer(encoding, scaled.view(heads, lanes, rows, -1), scratch)
    scaled = scaled.view(heads * lanes, rows, -1)
    peak = total = output = torch.empty(0)
    for walked, tile in enumerate(group.tiles()):
        scores = scratch.take("scores", scorer.channels, lanes, rows, tile.width)
        keys = _fetch(cache.key, tile, scratch)
        torch.bmm(scaled, keys.transpose(1, 2), out=scores[:heads].flatten(0, 1))
        scores = scorer(tile, scores).flatten(0, 1)
        top = scores.amax(-1, keepdim=True)
        if walked:
            top = torch.maximum(top, peak)
        weights = scores.sub_(top).clamp_min_(LOWEST_EXPONENT).exp_()
        mass, values = weights.sum(-1, keepdim=True), _fetch(cache.value, tile.centre, scratch)
        if walked:
            fade = (peak - top).clamp_min_(LOWEST_EXPONENT).exp_()
            total.mul_(fade).add_(mass)
            output.mul_(fade).baddbmm_(weights, values)
        else:
            total, output = mass, torch.bmm(weights, values)
        peak = top
    output /= total
    lse = peak + total.log_()
    # Rows run backwards: the last of them may lie before the first key that is here.
    unseeing = slice(group.longest - group.held[0].start, None)
    output[:, unseeing], lse[:, unseeing] = 0.0, -torch.inf
    return _rows_first(output, heads), _rows_first(lse, heads)[..., 0]


def _rows_first(values: Tensor, heads: int) -> Tensor:
    """Turn [H * G, R, X] into [G * R, H, X]."""
    return values.view(heads, -1, values.shape[-1]).transpose(0, 1)


def _fetch(plane: Tensor, tile: Tile, scratch: Scratch) -> Tensor:
    """Return the keys or values of a tile, [H * G, width, d]; a view where it can be one."""
    slots = tile.slots()
    if isinstance(slots, slice):
        found = plane[:, slots]
        return found if plane.dtype == scratch.dtype else scratch.take("keys", *found.shape).copy_(found)
    buffer = scratch.take("keys", len(plane), len(slots), plane.shape[2])
    if plane.dtype == scratch.dtype:
        torch.index_select(plane, 1, slots, out=buffer)
    else:
        buffer.copy_(plane.index_select(1, slots))
    return buffer.view(-1, tile.width, plane.shape[2])
