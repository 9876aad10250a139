"""Device code on one tile of (query, key) pairs of whole sequences: adapted scores, and the way back.

Letters: G heads of a group, M rows, N keys of a tile, P = M N pairs, d head size, D hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dape_kernels.triton.attend import GROUP, pairs_first
from dape_kernels.triton.scores import LEAKY_SLOPE

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_heads(
    sequence,  # [N, H, d] of one sequence, elements of a head adjacent
    token_stride,
    head_stride,
    first_token,
    tokens,
    first_head,
    first_element,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Load [G, TOKENS, DIM] from a token, a head and an element of it on, zeros where there is nothing."""
    token, head = tl.arange(0, TOKENS), first_head + tl.arange(0, GROUP)
    element = first_element + tl.arange(0, DIM)
    place = token[None, :, None] * token_stride + head[:, None, None] * head_stride + element[None, None, :]
    there = (first_token + token < tokens)[None, :, None] & (head < HEADS)[:, None, None]
    there &= (element < SIZE)[None, None, :]
    base = sequence + tl.cast(first_token, tl.int64) * token_stride
    return tl.load(base + place, mask=there, other=0.0)


@triton.jit
def store_heads(
    sequence,  # [N, H, d], contiguous
    values,
    first_token,
    tokens,
    first_head,
    first_element,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Store [G, M, X] where `load_heads` would load it."""
    token, head = tl.arange(0, values.shape[1]), first_head + tl.arange(0, GROUP)
    element = first_element + tl.arange(0, values.shape[2])
    place = token[None, :, None] * (HEADS * SIZE) + head[:, None, None] * SIZE + element[None, None, :]
    there = (first_token + token < tokens)[None, :, None] & (head < HEADS)[:, None, None]
    there &= (element < SIZE)[None, None, :]
    base = sequence + tl.cast(first_token, tl.int64) * (HEADS * SIZE)
    tl.store(base + place, values.to(sequence.dtype.element_ty), mask=there)


@triton.jit
def row_numbers(first_row, tokens, group, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Return where the numbers [G, M] of rows lie in float32 [N, GROUPS * G], and which rows there are."""
    row, head = first_row + tl.arange(0, ROWS), group * GROUP + tl.arange(0, GROUP)
    return row[None, :] * (GROUPS * GROUP) + head[:, None], (row < tokens)[None, :]


@triton.jit
def heads_first(pairs, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Turn [P, G] into [G, M, N]."""
    return tl.permute(tl.reshape(pairs, (ROWS, KEYS, GROUP)), (2, 0, 1))


@triton.jit
def see(first_row, first_key, tokens, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Return which pairs [M, N] a row sees, and the distances [P], of others any that tables hold."""
    row, column = first_row + tl.arange(0, ROWS), first_key + tl.arange(0, KEYS)
    visible = (column[None, :] <= row[:, None]) & (row < tokens)[:, None]
    pair = tl.arange(0, ROWS * KEYS)
    distance = first_row + pair // KEYS - first_key - pair % KEYS
    return visible, tl.minimum(tl.maximum(distance, 0), tokens - 1)


@triton.jit
def multiply(left, right, PRECISION: tl.constexpr):
    """Return the products [G, M, N] of rows [G, M, d] and keys [G, N, d]."""
    return tl.dot(left, tl.permute(right, (0, 2, 1)), input_precision=PRECISION)


@triton.jit
def multiply_parts(
    left,
    left_token,
    left_head,
    right,
    right_token,
    right_head,
    first_row,
    first_key,
    tokens,
    group,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the products [G, M, N] of rows and keys of sequences, loaded PART elements at a time."""
    head = group * GROUP
    found = tl.zeros((GROUP, ROWS, KEYS), tl.float32)
    for element in range(0, DIM, PART):
        rows = load_heads(
            left, left_token, left_head, first_row, tokens, head, element, HEADS, SIZE, PART, ROWS
        )
        keys = load_heads(
            right, right_token, right_head, first_key, tokens, head, element, HEADS, SIZE, PART, KEYS
        )
        found = tl.dot(rows, tl.permute(keys, (0, 2, 1)), found, input_precision=PRECISION)
    return found


@triton.jit
def load_weights(weights, group, WIDTH: tl.constexpr):
    """Load the weights [G, D] of a group in one of the network's layers."""
    head, unit = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    return tl.load(weights + (group * GROUP + head)[:, None] * WIDTH + unit[None, :])


@triton.jit
def hidden_values(
    scores,  # of the group
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
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the hidden values [P, D] before the activation."""
    unit = tl.arange(0, WIDTH)
    found = tl.load(hidden + distance[:, None] * WIDTH + unit[None, :]).to(tl.float32)
    weights = load_weights(first, group, WIDTH)
    found = tl.dot(pairs_first(scores).to(weights.dtype), weights, found, input_precision=PRECISION)
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
        weights = load_weights(first, near, WIDTH)
        channels = pairs_first(near_scores * scale).to(weights.dtype)
        found = tl.dot(channels, weights, found, input_precision=PRECISION)
    return found


@triton.jit
def adapted_scores(
    scores,
    activated,  # [P, D], of the products' dtype
    second,
    residual,
    distance,
    group,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEPS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the adapted scores [G, M, N] of a group, given its scores."""
    head = group * GROUP + tl.arange(0, GROUP)
    change = tl.load(residual + distance[:, None] * (GROUPS * GROUP) + head[None, :])
    if WIDTH > 0:
        weights = tl.trans(load_weights(second, group, WIDTH))
        change = tl.dot(activated, weights, change, input_precision=PRECISION)
    change = heads_first(change, ROWS, KEYS)
    return scores + change if KEEPS_SCORES else change


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
