"""The forward kernel of training: one program per tile of query rows and group of heads.

Letters: B sequences, N tokens, H heads, G heads of a group, d head size, D hidden width, M rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dape_kernels.triton.attend import GROUP, LOWEST
from dape_kernels.triton.dense.tiles import (
    LOG2_E,
    adapted_scores,
    hidden_values,
    load_heads,
    multiply,
    row_numbers,
    see,
    store_heads,
)
from dape_kernels.triton.scores import LEAKY_SLOPE


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    query,  # [B, N, H, d], elements of a head adjacent
    query_sequence,  # strides
    query_token,
    query_head,
    key,
    key_sequence,
    key_token,
    key_head,
    value,
    value_sequence,
    value_token,
    value_head,
    first,  # [GROUPS, G, D]
    hidden,  # [N, D], by distance, rounded as the weights
    second,  # [GROUPS, G, D]
    residual,  # float32 [N, GROUPS * G], by distance
    output,  # [B, N, H, d]
    lse,  # float32 [B, N, GROUPS * G]
    tokens,  # N
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,  # d
    DIM: tl.constexpr,  # d, rounded up to a power of two
    PART: tl.constexpr,  # elements of other groups' heads that are loaded at a time
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # D, rounded up; 0 without a network
    KEEPS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Compute a tile of rows of a group: grid [tiles, GROUPS, B], those with most keys first."""
    group, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    own = group * GROUP
    query += sequence * query_sequence
    key += sequence * key_sequence
    value += sequence * value_sequence
    queries = load_heads(query, query_token, query_head, first_row, tokens, own, 0, HEADS, SIZE, DIM, ROWS)
    peak = tl.full((GROUP, ROWS), LOWEST, tl.float32)
    mass = tl.zeros((GROUP, ROWS), tl.float32)
    total = tl.zeros((GROUP, ROWS, DIM), tl.float32)
    for first_key in range(0, tl.minimum(first_row + ROWS, tokens), KEYS):
        keys = load_heads(key, key_token, key_head, first_key, tokens, own, 0, HEADS, SIZE, DIM, KEYS)
        visible, distance = see(first_row, first_key, tokens, ROWS, KEYS)
        scores = multiply(queries, keys, PRECISION) * scale
        activated = scores
        if WIDTH > 0:
            before = hidden_values(
                scores,
                query,
                query_token,
                query_head,
                key,
                key_token,
                key_head,
                first,
                hidden,
                first_row,
                first_key,
                distance,
                tokens,
                group,
                scale,
                HEADS,
                SIZE,
                DIM,
                PART,
                GROUPS,
                WIDTH,
                PRECISION,
                ROWS,
                KEYS,
            )
            activated = tl.maximum(before, before * LEAKY_SLOPE).to(queries.dtype)
        adapted = adapted_scores(
            scores,
            activated,
            second,
            residual,
            distance,
            group,
            GROUPS,
            WIDTH,
            KEEPS_SCORES,
            PRECISION,
            ROWS,
            KEYS,
        )
        adapted = tl.where(visible[None, :, :], adapted * LOG2_E, LOWEST)
        highest = tl.maximum(peak, tl.max(adapted, 2))
        weight = tl.exp2(adapted - highest[:, :, None])
        fade = tl.exp2(peak - highest)
        mass = mass * fade + tl.sum(weight, 2)
        values = load_heads(value, value_token, value_head, first_key, tokens, own, 0, HEADS, SIZE, DIM, KEYS)
        total = tl.dot(weight.to(values.dtype), values, total * fade[:, :, None], input_precision=PRECISION)
        peak = highest
    place, there = row_numbers(first_row, tokens, group, GROUPS, ROWS)
    logarithms = lse + sequence * tokens * (GROUPS * GROUP)
    tl.store(logarithms + place, (peak + tl.log2(mass)) / LOG2_E, mask=there)
    # A row beyond the last one has no mass, and is not stored.
    result = total / tl.where(mass > 0, mass, 1.0)[:, :, None]
    rows = output + sequence * tokens * (HEADS * SIZE)
    store_heads(rows, result, first_row, tokens, own, 0, HEADS, SIZE)
