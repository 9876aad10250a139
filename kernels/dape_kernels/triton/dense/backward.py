"""The backward kernels of training, which compute every tile of pairs again from q, k and the log-sum-exp.

Two passes: over tiles of keys for the gradients in k and v, over tiles of rows for those in q and all
parameters. A tile of all heads is small, so the gradients in q of one pass over keys would be 48 atomic
additions a pair with 12 heads of 64: more than the second pass costs. Everything is summed in one order.

Letters: B sequences, N tokens, H heads, G heads of a group, d head size, D hidden width, M rows and K keys of
a tile, P = M K pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dape_kernels.triton.attend import GROUP
from dape_kernels.triton.dense.gradients import of_sources, pass_back
from dape_kernels.triton.dense.tiles import Tile, contiguous, load_heads, row_numbers, store_heads


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    output,  # [B, N, H, d]
    gradient,  # [B, N, H, d]
    delta,  # float32 [B, N, GROUPS * G]
    tokens,
    SHAPE: tl.constexpr,
):
    """Sum the products of outputs and their gradients over each head: grid [tiles, GROUPS, B]."""
    ROWS: tl.constexpr = SHAPE.ROWS
    first_row, group, sequence = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    outputs_of = contiguous(output, sequence, tokens, SHAPE)
    gradients_of = contiguous(gradient, sequence, tokens, SHAPE)
    outputs = load_heads(outputs_of, first_row, tokens, group * GROUP, 0, SHAPE, ROWS, SHAPE.DIM)
    gradients = load_heads(gradients_of, first_row, tokens, group * GROUP, 0, SHAPE, ROWS, SHAPE.DIM)
    place, there = row_numbers(first_row, tokens, group, SHAPE)
    found = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), 2)
    tl.store(delta + sequence * tokens * (SHAPE.GROUPS * GROUP) + place, found, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def keys_kernel(
    sources,  # `Sources`
    grad_key,  # [B, N, H, d]
    grad_value,
    tokens,
    scale,
    SHAPE: tl.constexpr,
):
    """Compute the gradients in a tile of keys and values: grid [tiles, GROUPS * DIM / PART, B]."""
    ROWS: tl.constexpr = SHAPE.ROWS
    KEYS: tl.constexpr = SHAPE.KEYS
    PART: tl.constexpr = SHAPE.PART
    PARTS: tl.constexpr = SHAPE.DIM // PART
    group, element = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS * PART
    first_key, sequence = tl.program_id(0) * KEYS, tl.program_id(2).to(tl.int64)
    own = group * GROUP
    sources = of_sources(sources, sequence, tokens, SHAPE)
    keys = load_heads(sources.key, first_key, tokens, own, element, SHAPE, KEYS, PART)
    values = load_heads(sources.value, first_key, tokens, own, element, SHAPE, KEYS, PART)
    of_keys = tl.zeros((GROUP, KEYS, PART), tl.float32)
    of_values = tl.zeros((GROUP, KEYS, PART), tl.float32)
    for first_row in range(first_key // ROWS * ROWS, tokens, ROWS):
        queries = load_heads(sources.query, first_row, tokens, own, element, SHAPE, ROWS, PART)
        of_output = load_heads(sources.gradient, first_row, tokens, own, element, SHAPE, ROWS, PART)
        tile = Tile(first_row, first_key, tokens)
        weight, of_scores, _, _, _, _ = pass_back(
            queries, keys, values, of_output, sources, tile, group, scale, SHAPE
        )
        weight = tl.permute(weight.to(queries.dtype), (0, 2, 1))
        of_scores = tl.permute(of_scores.to(queries.dtype), (0, 2, 1))
        of_values = tl.dot(weight, of_output, of_values, input_precision=SHAPE.PRECISION)
        of_keys = tl.dot(of_scores, queries, of_keys, input_precision=SHAPE.PRECISION)
    target = contiguous(grad_key, sequence, tokens, SHAPE)
    store_heads(target, of_keys * scale, first_key, tokens, own, element, SHAPE)
    target = contiguous(grad_value, sequence, tokens, SHAPE)
    store_heads(target, of_values, first_key, tokens, own, element, SHAPE)


@triton.jit
def _of_distances(first_distance, first_row, first_key, TILE: tl.constexpr, DTYPE: tl.constexpr):
    """Return which pairs [K, P] of a tile with as many rows as keys have K distances from the first on."""
    pair, distance = tl.arange(0, TILE * TILE), first_distance + tl.arange(0, TILE)
    found = first_row - first_key + pair // TILE - pair % TILE
    return (distance[:, None] == found[None, :]).to(DTYPE)


@triton.jit
def _add_distances(table, sums, first_distance, tokens, wanted):
    """Add sums [K, X] to the rows of a table [N, X] that are a program's own."""
    distance, column = first_distance + tl.arange(0, sums.shape[0]), tl.arange(0, sums.shape[1])
    there = ((distance >= 0) & (distance < tokens) & wanted)[:, None]
    # Atomic, because nobody waits for what it gives back; the order is that of the program.
    tl.atomic_add(table + distance[:, None] * sums.shape[1] + column[None, :], sums, there, sem="relaxed")


class Sums(NamedTuple):
    """Gradients in weights and tables, float32, of each program."""

    first: Any
    """[programs, GROUPS, G, D]."""
    hidden: Any
    """[programs, N, D], zero at first."""
    second: Any
    """[programs, GROUPS, G, D]."""
    residual: Any
    """[programs, GROUPS, N, G], zero at first."""


@triton.jit(do_not_specialize=["sequences", "tokens"])
def rows_kernel(
    sources,  # `Sources`
    grad_query,  # [B, N, H, d]
    sums,  # `Sums`
    sequences,
    tokens,
    scale,
    LEARNS: tl.constexpr,  # whether gradients in the tables are wanted
    SHAPE: tl.constexpr,  # with tiles of as many rows as keys
):
    """Compute the gradients in some tiles of queries, and what these add to those in parameters.

    Grid [programs, GROUPS * DIM / PART]. A program takes several tiles, because its part of the gradients in
    tables is as large as the tables.
    """
    tl.static_assert(SHAPE.ROWS == SHAPE.KEYS)
    TILE: tl.constexpr = SHAPE.ROWS
    PART: tl.constexpr = SHAPE.PART
    WIDTH: tl.constexpr = SHAPE.WIDTH
    GROUPS: tl.constexpr = SHAPE.GROUPS
    PRECISION: tl.constexpr = SHAPE.PRECISION
    program, programs = tl.program_id(0), tl.num_programs(0)
    PARTS: tl.constexpr = SHAPE.DIM // PART
    group, element = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS * PART
    own = group * GROUP
    tiles = tl.cdiv(tokens, TILE)
    count = tiles * sequences
    # Parts of a head have the same gradients in parameters, groups in the hidden table.
    counts = element == 0
    sums_residual = sums.residual + (program * GROUPS + group).to(tl.int64) * tokens * GROUP
    sums_hidden = sums.hidden + program.to(tl.int64) * tokens * WIDTH
    if WIDTH > 0:
        of_first = tl.zeros((GROUP, WIDTH), tl.float32)
        of_second = tl.zeros((GROUP, WIDTH), tl.float32)
    for turn in range(0, tl.cdiv(count, programs)):
        # There and back again, so that all programs get tiles of about as many keys; the longest first.
        forth = turn % 2 == 0
        number = turn * programs + tl.where(forth, program, programs - 1 - program)
        if number < count:
            first_row = (tiles - 1 - number // sequences) * TILE
            sequence = (number % sequences).to(tl.int64)
            own_sources = of_sources(sources, sequence, tokens, SHAPE)
            queries = load_heads(own_sources.query, first_row, tokens, own, element, SHAPE, TILE, PART)
            of_output = load_heads(own_sources.gradient, first_row, tokens, own, element, SHAPE, TILE, PART)
            of_queries = tl.zeros((GROUP, TILE, PART), tl.float32)
            # Sums over the diagonals that the next tile of keys goes on with.
            if LEARNS:
                carried_residual = tl.zeros((TILE, GROUP), tl.float32)
                if WIDTH > 0:
                    carried_hidden = tl.zeros((TILE, WIDTH), tl.float32)
            for first_key in range(0, first_row + TILE, TILE):
                keys = load_heads(own_sources.key, first_key, tokens, own, element, SHAPE, TILE, PART)
                values = load_heads(own_sources.value, first_key, tokens, own, element, SHAPE, TILE, PART)
                tile = Tile(first_row, first_key, tokens)
                _, of_scores, channels, activated, of_hidden, of_adapted = pass_back(
                    queries, keys, values, of_output, own_sources, tile, group, scale, SHAPE
                )
                if WIDTH > 0:
                    of_first = tl.dot(tl.trans(channels), of_hidden, of_first, input_precision=PRECISION)
                    of_second = tl.dot(tl.trans(of_adapted), activated, of_second, input_precision=PRECISION)
                if LEARNS:
                    distance = first_row - first_key + 1
                    far = _of_distances(distance, first_row, first_key, TILE, of_adapted.dtype)
                    near = _of_distances(distance - TILE, first_row, first_key, TILE, of_adapted.dtype)
                    found = tl.dot(far, of_adapted, carried_residual, input_precision=PRECISION)
                    _add_distances(sums_residual, found, distance, tokens, counts)
                    carried_residual = tl.dot(near, of_adapted, input_precision=PRECISION)
                    if WIDTH > 0:
                        found = tl.dot(far, of_hidden, carried_hidden, input_precision=PRECISION)
                        _add_distances(sums_hidden, found, distance, tokens, counts & (group == 0))
                        carried_hidden = tl.dot(near, of_hidden, input_precision=PRECISION)
                of_queries = tl.dot(of_scores.to(keys.dtype), keys, of_queries, input_precision=PRECISION)
            if LEARNS:
                _add_distances(sums_residual, carried_residual, 1 - TILE, tokens, counts)
                if WIDTH > 0:
                    _add_distances(sums_hidden, carried_hidden, 1 - TILE, tokens, counts & (group == 0))
                # The next tile adds to the same rows, perhaps by other threads.
                tl.debug_barrier()
            target = contiguous(grad_query, sequence, tokens, SHAPE)
            store_heads(target, of_queries * scale, first_row, tokens, own, element, SHAPE)
    if WIDTH > 0:
        head, unit = tl.arange(0, GROUP), tl.arange(0, WIDTH)
        place = (program * GROUPS + group) * (GROUP * WIDTH) + head[:, None] * WIDTH + unit[None, :]
        tl.store(sums.first + place, of_first, mask=counts)
        tl.store(sums.second + place, of_second, mask=counts)
