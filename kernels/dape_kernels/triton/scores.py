"""Device code from plain to adapted scores: positional biases and the network over all heads.

Scores are in units of log 2. Pairs come first: a tile is a matrix of P = rows x keys pairs by 16 heads, so
that the network's two layers are two products on the tensor cores. Letters: P pairs, G heads of a group, D
hidden width, k kernel length.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How the static bias of a pair comes about.
NONE, LINEAR, TABLE, FIRE = map(tl.constexpr, range(4))
LEAKY_SLOPE = tl.constexpr(0.01)


@triton.jit
def _per_head(bias_heads, row, heads, STRIDE: tl.constexpr):
    """Load one row [1, G] of the parameters per head."""
    return tl.load(bias_heads + row * STRIDE + heads)[None, :]


@triton.jit
def static_bias(
    distance,
    query,
    heads,
    bias_heads,
    bias_units,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the static bias [P, G] of pairs with distances and query positions int32 [P]."""
    if KIND == LINEAR:
        bias = distance.to(tl.float32)[:, None] * _per_head(bias_heads, 0, heads, STRIDE)
    elif KIND == TABLE:
        bias = tl.load(bias_heads + distance[:, None] * STRIDE + heads[None, :])
    else:
        # bias_units: c, threshold, slope left of 0, then weights and biases of the hidden units; the output
        # bias is the last row of the parameters per head.
        factor, threshold = tl.load(bias_units), tl.load(bias_units + 1)
        longest = tl.maximum(query.to(tl.float32), threshold)
        ratio = tl.log(tl.abs(factor * distance) + 1.0) / (tl.log(tl.abs(factor * longest) + 1.0) + 1e-6)
        unit = tl.arange(0, UNITS)
        hidden = ratio[:, None] * tl.load(bias_units + 3 + unit)[None, :]
        hidden += tl.load(bias_units + 3 + UNITS + unit)[None, :]
        hidden = tl.where(hidden > 0, hidden, hidden * tl.load(bias_units + 2))
        weight = tl.load(bias_heads + unit[:, None] * STRIDE + heads[None, :])
        bias = tl.dot(hidden, weight, input_precision=PRECISION)
        bias += _per_head(bias_heads, UNITS, heads, STRIDE)
    return bias


@triton.jit
def shifted(values, OFFSET: tl.constexpr):
    """Return the rows [P, X] of the pairs OFFSET keys further on.

    Keys run fastest, so only the first or last |OFFSET| keys of a row of pairs get what is not theirs; the
    halo of a tile is wide enough that nothing comes of these.
    """
    if OFFSET == 0:
        return values
    else:
        PAIRS: tl.constexpr = values.shape[0]
        source = tl.arange(0, PAIRS) + OFFSET
        source = tl.minimum(tl.maximum(source, 0), PAIRS - 1)
        return tl.gather(values, tl.broadcast_to(source[:, None], values.shape), 0)


@triton.jit
def first_layer(
    hidden,
    channels,
    weights,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return hidden [P, D] plus what channels [P, G] make of it: weights [k, G, D]."""
    place = tl.arange(0, GROUP)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for tap in tl.static_range(TAPS):
        weight = tl.load(weights + tap * GROUP * WIDTH + place)
        moved = shifted(channels, tap - TAPS // 2)
        hidden = tl.dot(moved.to(weight.dtype), weight, hidden, input_precision=PRECISION)
    return hidden


@triton.jit
def second_layer(hidden, weights, bias, GROUP: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr):
    """Return the change [P, G] of the scores by activated hidden values [P, D]: weights [k, D, G]."""
    WIDTH: tl.constexpr = hidden.shape[1]
    place = tl.arange(0, WIDTH)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    change = tl.zeros((hidden.shape[0], GROUP), tl.float32) + tl.load(bias + tl.arange(0, GROUP))[None, :]
    for tap in tl.static_range(TAPS):
        weight = tl.load(weights + tap * WIDTH * GROUP + place)
        product = tl.dot(hidden.to(weight.dtype), weight, input_precision=PRECISION)
        change += shifted(product, tap - TAPS // 2)
    return change
