"""The forward kernel of training: one program per tile of query rows and group of heads.

Letters: B sequences, N tokens, H heads, G heads of a group, d head size, D hidden width, M rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dape_kernels.triton.attend import GROUP, LOWEST
from dape_kernels.triton.dense.tiles import (
    LOG2_E,
    Tile,
    activate,
    adapted_scores,
    contiguous,
    load_heads,
    multiply,
    of_sequence,
    row_numbers,
    see,
    store_heads,
)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    query,  # `Heads`
    key,
    value,
    network,  # `Network`
    output,  # [B, N, H, d]
    lse,  # float32 [B, N, GROUPS * G]
    tokens,  # N
    scale,
    SHAPE: tl.constexpr,  # `Shape`
):
    """Compute a tile of rows of a group: grid [tiles, GROUPS, B], those with most keys first."""
    ROWS: tl.constexpr = SHAPE.ROWS
    DIM: tl.constexpr = SHAPE.DIM
    group, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    own = group * GROUP
    query, key, value = of_sequence(query, sequence), of_sequence(key, sequence), of_sequence(value, sequence)
    queries = load_heads(query, first_row, tokens, own, 0, SHAPE, ROWS, DIM)
    peak = tl.full((GROUP, ROWS), LOWEST, tl.float32)
    mass = tl.zeros((GROUP, ROWS), tl.float32)
    total = tl.zeros((GROUP, ROWS, DIM), tl.float32)
    for first_key in range(0, tl.minimum(first_row + ROWS, tokens), SHAPE.KEYS):
        tile = Tile(first_row, first_key, tokens)
        keys = load_heads(key, first_key, tokens, own, 0, SHAPE, SHAPE.KEYS, DIM)
        visible, distance = see(tile, SHAPE)
        scores = multiply(queries, keys, SHAPE.PRECISION) * scale
        activated = scores
        if SHAPE.WIDTH > 0:
            activated = activate(scores, query, key, network, tile, distance, group, scale, SHAPE)
        adapted = adapted_scores(scores, activated, network, distance, group, SHAPE)
        adapted = tl.where(visible[None, :, :], adapted * LOG2_E, LOWEST)
        highest = tl.maximum(peak, tl.max(adapted, 2))
        weight = tl.exp2(adapted - highest[:, :, None])
        fade = tl.exp2(peak - highest)
        mass = mass * fade + tl.sum(weight, 2)
        values = load_heads(value, first_key, tokens, own, 0, SHAPE, SHAPE.KEYS, DIM)
        faded = total * fade[:, :, None]
        total = tl.dot(weight.to(values.dtype), values, faded, input_precision=SHAPE.PRECISION)
        peak = highest
    place, there = row_numbers(first_row, tokens, group, SHAPE)
    logarithms = lse + sequence * tokens * (SHAPE.GROUPS * GROUP)
    tl.store(logarithms + place, (peak + tl.log2(mass)) / LOG2_E, mask=there)
    # A row beyond the last one has no mass, and is not stored.
    result = total / tl.where(mass > 0, mass, 1.0)[:, :, None]
    store_heads(contiguous(output, sequence, tokens, SHAPE), result, first_row, tokens, own, 0, SHAPE)
