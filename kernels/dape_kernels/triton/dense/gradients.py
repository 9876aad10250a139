"""Device code on one tile of pairs: from q, k and the gradient in the output back to those in scores.

Letters: G heads of a group, M rows, N keys of a tile, P = M N pairs, d head size, D hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dape_kernels.triton.attend import pairs_first
from dape_kernels.triton.dense.tiles import (
    LOG2_E,
    adapted_scores,
    heads_first,
    hidden_values,
    load_weights,
    multiply,
    multiply_parts,
    row_numbers,
    see,
)
from dape_kernels.triton.scores import LEAKY_SLOPE


@triton.jit
def weights_and_gradients(
    scores,
    activated,
    of_weight,
    lse,
    delta,
    second,
    residual,
    visible,
    distance,
    first_row,
    tokens,
    group,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEPS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the weights [G, M, N] of a group, and by their gradients those in its adapted scores."""
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
    place, there = row_numbers(first_row, tokens, group, GROUPS, ROWS)
    logarithm = tl.load(lse + place, mask=there, other=0.0) * LOG2_E
    weight = tl.exp2(adapted * LOG2_E - logarithm[:, :, None])
    weight = tl.where(visible[None, :, :], weight, 0.0)
    return weight, weight * (of_weight - tl.load(delta + place, mask=there, other=0.0)[:, :, None])


@triton.jit
def pass_back(
    queries,  # of the group, [G, M, PART]
    keys,  # [G, N, PART]
    values,
    of_output,
    query,  # of the sequence, where other groups and other parts are loaded from
    query_token,
    query_head,
    key,
    key_token,
    key_head,
    value,
    value_token,
    value_head,
    gradient,
    lse,
    delta,
    first,
    hidden,
    second,
    residual,
    first_row,
    first_key,
    tokens,
    group,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEPS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Go from q, k and the gradient in the output to all that gradients are made of.

    Returns:
        The group's attention weights [G, M, N] and gradients in its scores; then the network's inputs [P, G],
        activated hidden values [P, D], gradients in hidden values [P, D] and in adapted scores [P, G], in the
        dtype of products (without a network only the last one means anything).
    """
    DTYPE: tl.constexpr = queries.dtype
    visible, distance = see(first_row, first_key, tokens, ROWS, KEYS)
    if PART == DIM:
        scores = multiply(queries, keys, PRECISION)
    else:
        scores = multiply_parts(
            query,
            query_token,
            query_head,
            key,
            key_token,
            key_head,
            first_row,
            first_key,
            tokens,
            group,
            HEADS,
            SIZE,
            DIM,
            PART,
            PRECISION,
            ROWS,
            KEYS,
        )
    scores *= scale
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
        activated = tl.maximum(before, before * LEAKY_SLOPE).to(DTYPE)
    if PART == DIM:
        of_weight = multiply(of_output, values, PRECISION)
    else:
        of_weight = multiply_parts(
            gradient,
            HEADS * SIZE,
            SIZE,
            value,
            value_token,
            value_head,
            first_row,
            first_key,
            tokens,
            group,
            HEADS,
            SIZE,
            DIM,
            PART,
            PRECISION,
            ROWS,
            KEYS,
        )
    weight, of_adapted = weights_and_gradients(
        scores,
        activated,
        of_weight,
        lse,
        delta,
        second,
        residual,
        visible,
        distance,
        first_row,
        tokens,
        group,
        GROUPS,
        WIDTH,
        KEEPS_SCORES,
        PRECISION,
        ROWS,
        KEYS,
    )
    channels, of_pairs = pairs_first(scores).to(DTYPE), pairs_first(of_adapted).to(DTYPE)
    of_scores, of_hidden = of_adapted, channels
    if WIDTH > 0:
        of_activated = tl.dot(of_pairs, load_weights(second, group, WIDTH), input_precision=PRECISION)
        for other in range(1, GROUPS):
            near = (group + other) % GROUPS
            near_scores = multiply_parts(
                query,
                query_token,
                query_head,
                key,
                key_token,
                key_head,
                first_row,
                first_key,
                tokens,
                near,
                HEADS,
                SIZE,
                DIM,
                PART,
                PRECISION,
                ROWS,
                KEYS,
            )
            near_of_weight = multiply_parts(
                gradient,
                HEADS * SIZE,
                SIZE,
                value,
                value_token,
                value_head,
                first_row,
                first_key,
                tokens,
                near,
                HEADS,
                SIZE,
                DIM,
                PART,
                PRECISION,
                ROWS,
                KEYS,
            )
            _, near_of_adapted = weights_and_gradients(
                near_scores * scale,
                activated,
                near_of_weight,
                lse,
                delta,
                second,
                residual,
                visible,
                distance,
                first_row,
                tokens,
                near,
                GROUPS,
                WIDTH,
                KEEPS_SCORES,
                PRECISION,
                ROWS,
                KEYS,
            )
            near_of_pairs = pairs_first(near_of_adapted).to(DTYPE)
            weights = load_weights(second, near, WIDTH)
            of_activated = tl.dot(near_of_pairs, weights, of_activated, input_precision=PRECISION)
        # The sign of the activated value is that of its input.
        of_hidden = tl.where(activated > 0, of_activated, of_activated * LEAKY_SLOPE).to(DTYPE)
        weights = tl.trans(load_weights(first, group, WIDTH))
        of_channels = tl.dot(of_hidden, weights, input_precision=PRECISION)
        of_scores = heads_first(of_channels, ROWS, KEYS)
        if KEEPS_SCORES:
            of_scores += of_adapted
    return weight, of_scores, channels, activated, of_hidden, of_pairs
