"""Device code on one tile of pairs: from q, k and the gradient in the output back to those in scores.

Letters: G heads of a group, M rows, N keys of a tile, P = M N pairs, d head size, D hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dape_kernels.triton.attend import GROUP, pairs_first
from dape_kernels.triton.dense.tiles import (
    LOG2_E,
    activate,
    adapted_scores,
    contiguous,
    heads_first,
    load_weights,
    multiply,
    multiply_parts,
    of_sequence,
    row_numbers,
    see,
)
from dape_kernels.triton.scores import LEAKY_SLOPE


class Sources(NamedTuple):
    """What a sequence's gradients are made of; see `rows_kernel`."""

    query: Any
    key: Any
    value: Any
    gradient: Any
    lse: Any
    delta: Any
    network: Any


@triton.jit
def of_sources(sources, sequence, tokens, SHAPE: tl.constexpr):
    """Return the part of one sequence."""
    rows = sequence * tokens * (SHAPE.GROUPS * GROUP)
    return Sources(
        of_sequence(sources.query, sequence),
        of_sequence(sources.key, sequence),
        of_sequence(sources.value, sequence),
        contiguous(sources.gradient, sequence, tokens, SHAPE),
        sources.lse + rows,
        sources.delta + rows,
        sources.network,
    )


@triton.jit
def weights_and_gradients(
    scores,
    activated,
    of_weight,
    sources,
    tile,
    visible,
    distance,
    group,
    SHAPE: tl.constexpr,
):
    """Return the weights [G, M, N] of a group, and by their gradients those in its adapted scores."""
    adapted = adapted_scores(scores, activated, sources.network, distance, group, SHAPE)
    place, there = row_numbers(tile.first_row, tile.tokens, group, SHAPE)
    logarithm = tl.load(sources.lse + place, mask=there, other=0.0) * LOG2_E
    weight = tl.exp2(adapted * LOG2_E - logarithm[:, :, None])
    weight = tl.where(visible[None, :, :], weight, 0.0)
    delta = tl.load(sources.delta + place, mask=there, other=0.0)
    return weight, weight * (of_weight - delta[:, :, None])


@triton.jit
def pass_back(
    queries,  # of the group, [G, M, PART]
    keys,  # [G, N, PART]
    values,
    of_output,
    sources,  # of the sequence, where other groups and other parts are loaded from
    tile,
    group,
    scale,
    SHAPE: tl.constexpr,
):
    """Go from q, k and the gradient in the output to all that gradients are made of.

    Returns:
        The group's attention weights [G, M, N] and gradients in its scores; then the network's inputs [P, G],
        activated hidden values [P, D], gradients in hidden values [P, D] and in adapted scores [P, G], in the
        dtype of products (without a network only the last one means anything).
    """
    DTYPE: tl.constexpr = queries.dtype
    query, key, value, gradient = sources.query, sources.key, sources.value, sources.gradient
    network = sources.network
    visible, distance = see(tile, SHAPE)
    if SHAPE.PART == SHAPE.DIM:
        scores = multiply(queries, keys, SHAPE.PRECISION) * scale
        of_weight = multiply(of_output, values, SHAPE.PRECISION)
    else:
        scores = multiply_parts(query, key, tile, group, SHAPE) * scale
        of_weight = multiply_parts(gradient, value, tile, group, SHAPE)
    activated = scores
    if SHAPE.WIDTH > 0:
        activated = activate(scores, query, key, network, tile, distance, group, scale, SHAPE)
    weight, of_adapted = weights_and_gradients(
        scores, activated, of_weight, sources, tile, visible, distance, group, SHAPE
    )
    channels, of_pairs = pairs_first(scores).to(DTYPE), pairs_first(of_adapted).to(DTYPE)
    of_scores, of_hidden = of_adapted, channels
    if SHAPE.WIDTH > 0:
        weights = load_weights(network.second, group, SHAPE.WIDTH)
        of_activated = tl.dot(of_pairs, weights, input_precision=SHAPE.PRECISION)
        for other in range(1, SHAPE.GROUPS):
            near = (group + other) % SHAPE.GROUPS
            near_scores = multiply_parts(query, key, tile, near, SHAPE) * scale
            near_of_weight = multiply_parts(gradient, value, tile, near, SHAPE)
            _, near_of_adapted = weights_and_gradients(
                near_scores, activated, near_of_weight, sources, tile, visible, distance, near, SHAPE
            )
            near_of_pairs = pairs_first(near_of_adapted).to(DTYPE)
            weights = load_weights(network.second, near, SHAPE.WIDTH)
            of_activated = tl.dot(near_of_pairs, weights, of_activated, input_precision=SHAPE.PRECISION)
        # The sign of the activated value is that of its input.
        of_hidden = tl.where(activated > 0, of_activated, of_activated * LEAKY_SLOPE).to(DTYPE)
        weights = tl.trans(load_weights(network.first, group, SHAPE.WIDTH))
        of_channels = tl.dot(of_hidden, weights, input_precision=SHAPE.PRECISION)
        of_scores = heads_first(of_channels, SHAPE)
        if SHAPE.KEEPS_SCORES:
            of_scores += of_adapted
    return weight, of_scores, channels, activated, of_hidden, of_pairs
