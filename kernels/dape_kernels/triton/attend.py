"""The attention kernel: one program per tile of query rows, all heads in it, keys in tiles beside it.

Prefill, scoring and decoding are the same kernel with other tile sizes. Tiles of rows multiply in a batch of
heads; a single row multiplies as the block diagonal of its heads, [G, G d], by keys laid out as they are
cached, [N, G d]: 16 times the products that are needed, which tensor cores have to spare while they wait for
memory, and no sums across threads. Where there are
fewer tiles than processors the keys are split too, and `merge_kernel` joins the parts by their log-sum-exp.

Heads go in groups of 16, the K dimension of the network's product. With more than one group a program
computes the hidden layer from all of them and the outputs of one, so that its accumulators fit the registers.
Letters: G heads of a group, M rows, N keys of a tile, d head size, P = M N pairs, D hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dape_kernels.triton.scores import LEAKY_SLOPE, NONE, first_layer, second_layer, static_bias

GROUP = tl.constexpr(16)
# A program's work, int32: first row of the batch, rows, sequence, position of the first row, context length.
ITEM = tl.constexpr(5)
LOWEST = tl.constexpr(-1e30)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_query(
    query,
    first_row,
    count,
    row_stride,
    head_stride,
    first_head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Load queries [G, M, d], zeros where there is none; a single row as the block diagonal [G, G d]."""
    lane = tl.arange(0, GROUP)
    head = first_head + lane
    if ROWS == 1:
        line = tl.arange(0, GROUP * DIM)
        dim = line % DIM
        place = first_row * row_stride + head[:, None] * head_stride + dim[None, :]
        there = (lane[:, None] == line[None, :] // DIM) & (head < HEADS)[:, None] & (dim < SIZE)[None, :]
    else:
        dim = tl.arange(0, DIM)
        row = tl.arange(0, ROWS)
        place = (first_row + row)[None, :, None] * row_stride + head[:, None, None] * head_stride
        place += dim[None, None, :]
        there = (row < count)[None, :, None] & (head < HEADS)[:, None, None] & (dim < SIZE)[None, None, :]
    return tl.load(query + place, mask=there, other=0.0)


@triton.jit
def _load_cached(
    plane,
    slot,
    there,
    first_head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Load keys or values [G, N, d] from slots int64 [N], zeros where there is none; [N, G d] for one row."""
    if ROWS == 1:
        line = tl.arange(0, GROUP * DIM)
        head, dim = first_head + line // DIM, line % DIM
        place = slot[:, None] * (HEADS * SIZE) + (head * SIZE + dim)[None, :]
        held = there[:, None] & ((head < HEADS) & (dim < SIZE))[None, :]
    else:
        head, dim = first_head + tl.arange(0, GROUP), tl.arange(0, DIM)
        place = slot[None, :, None] * (HEADS * SIZE) + head[:, None, None] * SIZE + dim[None, None, :]
        held = there[None, :, None] & (head < HEADS)[:, None, None] & (dim < SIZE)[None, None, :]
    return tl.load(plane + place, mask=held, other=0.0)


@triton.jit
def _load_scale(scales, slot, there, first_head, HEADS: tl.constexpr):
    """Load the scales [G, 1, N] of an int8 cache."""
    head = first_head + tl.arange(0, GROUP)
    held = there[None, None, :] & (head < HEADS)[:, None, None]
    return tl.load(scales + slot[None, None, :] * HEADS + head[:, None, None], mask=held, other=0.0)


@triton.jit
def _scores(
    queries,
    keys,
    key_scales,
    slot,
    there,
    first_head,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    QUANTISED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the scaled scores [G, M, N] of queries and the cached keys of a tile."""
    cached = _load_cached(keys, slot, there, first_head, HEADS, SIZE, DIM, ROWS).to(queries.dtype)
    if ROWS == 1:
        scores = tl.dot(queries, tl.trans(cached), input_precision=PRECISION)[:, None, :]
    else:
        scores = tl.dot(queries, tl.permute(cached, (0, 2, 1)), input_precision=PRECISION)
    scores *= scale
    if QUANTISED:
        scores *= _load_scale(key_scales, slot, there, first_head, HEADS)
    return scores


@triton.jit
def _add_values(
    total, fade, weight, cached, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr
):
    """Return total, faded, plus weights [G, M, N] times values, both laid out as `_load_cached` says."""
    if ROWS == 1:
        flat = tl.reshape(weight, (GROUP, weight.shape[2])).to(DTYPE)
        total = tl.dot(flat, cached.to(DTYPE), total * fade, input_precision=PRECISION)
    else:
        total = tl.dot(
            weight.to(DTYPE), cached.to(DTYPE), total * fade[:, :, None], input_precision=PRECISION
        )
    return total


@triton.jit
def pairs_first(scores):
    """Turn [G, M, N] into [P, G]."""
    GROUP_SIZE: tl.constexpr = scores.shape[0]
    PAIRS: tl.constexpr = scores.shape[1] * scores.shape[2]
    return tl.reshape(tl.permute(scores, (1, 2, 0)), (PAIRS, GROUP_SIZE))


# Numbers that change from step to step are not compiled in: no request waits for a compiler.
@triton.jit(do_not_specialize=["table_stride", "splits"])
def attend_kernel(
    query,  # [T, H, d], elements of a head adjacent
    query_row_stride,
    query_head_stride,
    keys,  # [slots, H, d]
    values,
    key_scales,  # [slots, H]; int8 caches only
    value_scales,
    block_tables,  # int32 [S, blocks]
    table_stride,
    items,  # int32 [items, ITEM]; rows 0: nothing to do
    first,  # [GROUPS, 2 (scores, biases), k, G, D]
    hidden_bias,  # [D]
    second,  # [GROUPS, k, D, G]
    out_bias,  # [GROUPS * G]
    bias_heads,  # [rows, GROUPS * G]
    bias_units,
    output,  # [T, H, d]
    lse,  # [T, H]
    parts,  # float32 [splits, items * M, H, d]
    part_lses,  # float32 [splits, items * M, H]
    splits,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,  # d
    DIM: tl.constexpr,  # d, rounded up to a power of two
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # D, rounded up; 0 without a network
    TAPS: tl.constexpr,
    KEEPS_SCORES: tl.constexpr,
    KEEPS_BIAS: tl.constexpr,
    FEEDS_BIAS: tl.constexpr,
    OFFICIAL: tl.constexpr,  # hidden columns right of the last key are zero
    KIND: tl.constexpr,
    UNITS: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTED: tl.constexpr,  # the keys of an item are split
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,  # M
    KEYS: tl.constexpr,  # N
):
    """Compute one tile of rows, one group of heads and one part of their keys."""
    item, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row, count = tl.load(items + item * ITEM), tl.load(items + item * ITEM + 1)
    if count == 0:
        return
    sequence, position = tl.load(items + item * ITEM + 2), tl.load(items + item * ITEM + 3)
    context = tl.load(items + item * ITEM + 4)
    HALO: tl.constexpr = 2 * (TAPS // 2)
    STEP: tl.constexpr = KEYS - 2 * HALO
    STRIDE: tl.constexpr = GROUPS * GROUP
    PAIRS: tl.constexpr = ROWS * KEYS

    place, lane = tl.arange(0, ROWS), tl.arange(0, GROUP)
    own = group * GROUP
    # Beyond the last row the query is zero and the position the last one's: finite, and never stored.
    row_position = position + tl.minimum(place, count - 1)
    pair = tl.arange(0, PAIRS)
    pair_query = position + tl.minimum(pair // KEYS, count - 1)

    longest = position + count
    part = tl.cdiv(tl.cdiv(longest, splits), STEP) * STEP
    begin = split * part
    end = tl.minimum(begin + part, longest)

    queries = _load_query(
        query, first_row, count, query_row_stride, query_head_stride, own, HEADS, SIZE, DIM, ROWS
    )
    peak = tl.full((GROUP, ROWS), LOWEST, tl.float32)
    mass = tl.zeros((GROUP, ROWS), tl.float32)
    # A single row's outputs of a head are on the diagonal; the rest comes along with the tensor cores.
    if ROWS == 1:
        total = tl.zeros((GROUP, GROUP * DIM), tl.float32)
    else:
        total = tl.zeros((GROUP, ROWS, DIM), tl.float32)
    for start in range(begin, end, STEP):
        column = start - HALO + tl.arange(0, KEYS)
        there = (column >= 0) & (column < longest)
        block = tl.load(block_tables + sequence * table_stride + column // BLOCK_SIZE, mask=there, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + column % BLOCK_SIZE
        scores = _scores(
            queries,
            keys,
            key_scales,
            slot,
            there,
            own,
            scale,
            HEADS,
            SIZE,
            DIM,
            QUANTISED,
            PRECISION,
            ROWS,
        )
        visible = column[None, :] <= row_position[:, None]

        pair_key = start - HALO + pair % KEYS
        # Columns beside the sequence have the distances of its ends: a table holds no others.
        distance = tl.maximum(pair_query - tl.maximum(pair_key, 0), 0)
        seen = ((pair_key >= 0) & (pair_key <= pair_query))[:, None]
        if KIND != NONE:
            bias = static_bias(
                distance, pair_query, own + lane, bias_heads, bias_units, STRIDE, KIND, UNITS, PRECISION
            )
        change = tl.zeros((PAIRS, GROUP), tl.float32)
        if WIDTH > 0:
            hidden = tl.zeros((PAIRS, WIDTH), tl.float32)
            hidden += tl.load(hidden_bias + tl.arange(0, WIDTH))[None, :]
            LAYER: tl.constexpr = TAPS * GROUP * WIDTH
            for other in tl.static_range(0, GROUPS):
                near = (group + other) % GROUPS
                weights = first + near * 2 * LAYER
                if other == 0:
                    channels = pairs_first(scores)
                else:
                    others = _load_query(
                        query,
                        first_row,
                        count,
                        query_row_stride,
                        query_head_stride,
                        near * GROUP,
                        HEADS,
                        SIZE,
                        DIM,
                        ROWS,
                    )
                    channels = pairs_first(
                        _scores(
                            others,
                            keys,
                            key_scales,
                            slot,
                            there,
                            near * GROUP,
                            scale,
                            HEADS,
                            SIZE,
                            DIM,
                            QUANTISED,
                            PRECISION,
                            ROWS,
                        )
                    )
                if TAPS > 1:
                    channels = tl.where(seen, channels, 0.0)
                hidden = first_layer(hidden, channels, weights, WIDTH, GROUP, TAPS, PRECISION)
                if FEEDS_BIAS:
                    if other == 0:
                        inputs = bias
                    else:
                        inputs = static_bias(
                            distance,
                            pair_query,
                            near * GROUP + lane,
                            bias_heads,
                            bias_units,
                            STRIDE,
                            KIND,
                            UNITS,
                            PRECISION,
                        )
                    if TAPS > 1:
                        inputs = tl.where(seen, inputs, 0.0)
                    hidden = first_layer(hidden, inputs, weights + LAYER, WIDTH, GROUP, TAPS, PRECISION)
            hidden = tl.maximum(hidden, hidden * LEAKY_SLOPE)
            if TAPS > 1:
                inside = pair_key >= 0
                if OFFICIAL:
                    inside &= pair_key < context
                hidden = tl.where(inside[:, None], hidden, 0.0)
            change = second_layer(
                hidden.to(queries.dtype),
                second + group * LAYER,
                out_bias + group * GROUP,
                GROUP,
                TAPS,
                PRECISION,
            )
        if KIND != NONE and KEEPS_BIAS:
            change += bias
        change = tl.permute(tl.reshape(change, (ROWS, KEYS, GROUP)), (2, 0, 1))
        adapted = scores + change if KEEPS_SCORES else change
        mine = (column >= start) & (column < end) & (column < start + STEP)
        adapted = tl.where((visible & mine[None, :])[None, :, :], adapted, LOWEST)

        highest = tl.maximum(peak, tl.max(adapted, 2))
        weight = tl.exp2(adapted - highest[:, :, None])
        fade = tl.exp2(peak - highest)
        mass = mass * fade + tl.sum(weight, 2)
        if QUANTISED:
            weight *= _load_scale(value_scales, slot, there, own, HEADS)
        cached = _load_cached(values, slot, there, own, HEADS, SIZE, DIM, ROWS)
        total = _add_values(total, fade, weight, cached, queries.dtype, PRECISION, ROWS)
        peak = highest

    # A part without a key that the row may see: its weight in the merge is zero.
    empty = peak <= LOWEST
    logarithm = tl.where(empty, LOWEST, (peak + tl.log2(tl.where(empty, 1.0, mass))) * LN_2)
    if ROWS == 1:
        diagonal = lane[:, None, None] == lane[None, :, None]
        total = tl.sum(tl.where(diagonal, tl.reshape(total, (GROUP, GROUP, DIM)), 0.0), 1)[:, None, :]
    result = total / tl.where(mass > 0, mass, 1.0)[:, :, None]
    head, dim = own + lane, tl.arange(0, DIM)
    held = (head < HEADS)[:, None] & (place < count)[None, :]
    there_too = held[:, :, None] & (dim < SIZE)[None, None, :]
    if not PARTED:
        target = (first_row + place).to(tl.int64)[None, :] * HEADS + head[:, None]
        tl.store(lse + target, logarithm, mask=held)
        place_out = target[:, :, None] * SIZE + dim[None, None, :]
        tl.store(output + place_out, result.to(output.dtype.element_ty), mask=there_too)
    else:
        line = (split * tl.num_programs(0) + item).to(tl.int64) * ROWS + place
        target = line[None, :] * HEADS + head[:, None]
        tl.store(part_lses + target, logarithm, mask=held)
        tl.store(parts + target[:, :, None] * SIZE + dim[None, None, :], result, mask=there_too)


@triton.jit(do_not_specialize=["splits", "num_lines"])
def merge_kernel(
    items,
    parts,
    part_lses,
    output,
    lse,
    splits,
    num_lines,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Join the parts of one row and head, weighted by the exponentials of their log-sum-exps."""
    line, head = tl.program_id(0), tl.program_id(1)
    item, place = line // ROWS, line % ROWS
    if place >= tl.load(items + item * ITEM + 1):
        return
    lane, dim = tl.arange(0, MOST_SPLITS), tl.arange(0, DIM)
    source = line.to(tl.int64) * HEADS + head
    step = num_lines.to(tl.int64) * HEADS
    logarithms = tl.load(part_lses + source + lane * step, mask=lane < splits, other=LOWEST)
    highest = tl.max(logarithms, 0)
    mass = tl.sum(tl.exp(logarithms - highest), 0)
    result = tl.zeros((DIM,), tl.float32)
    for _ in range(splits):
        weight = tl.exp(tl.load(part_lses + source) - highest) / mass
        result += weight * tl.load(parts + source * SIZE + dim, mask=dim < SIZE, other=0.0)
        source += step
    target = (tl.load(items + item * ITEM) + place).to(tl.int64) * HEADS + head
    tl.store(lse + target, highest + tl.log(mass))
    tl.store(output + target * SIZE + dim, result.to(output.dtype.element_ty), mask=dim < SIZE)
