"""The output layer, hidden states times vocabulary, in float32 and in pieces of bounded size.

It never holds a [rows, vocabulary] buffer while scoring. Letters: R rows, h hidden size, V vocabulary,
k alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from dape_engine.errors import StepError
from dape_kernels.decoder import Decoder

Product: TypeAlias = Callable[[Tensor], Tensor]
"""From hidden states [R, h] to logits float32 [R, tokens], a tensor of its own."""
WORKSPACE = 32 << 20
"""Bytes of scratch memory of one call, unless the caller says otherwise."""
COMPARED = 1 << 18
"""Logits that are compared with their rows' targets at a time, unless a row has more: a cache holds them."""


def logits(hidden: Tensor, weight: Tensor, *, workspace: int = WORKSPACE) -> Tensor:
    """Return the logits float32 [R, V]: products of the given values, exact but for float32 sums.

    Args:
        hidden: [R, h], any float type; few rows, since the result holds all their logits.
        weight: [V, h], any float type; narrow weights are widened piece by piece.
        workspace: bytes of scratch memory for the widened weights.
    """
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype.itemsize == 2:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    result = hidden.new_empty((len(hidden), len(weight)), dtype=torch.float32)
    wide = hidden.float()
    for first, piece in _pieces(weight, workspace):
        torch.mm(wide, piece.t(), out=result[:, first : first + len(piece)])
    return result


def score_targets(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    top: int = 0,
    *,
    decoder: Decoder | None = None,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the log-probability and rank of one token per row, and the most likely tokens at its place.

    The log-sum-exp runs over pieces of the rows and of the vocabulary. Target and alternatives are read from
    the same numbers: where the target is the most likely token, both log-probabilities are equal to the bit.
    A rank is 1 + the number of more likely tokens; tokens whose logits differ by rounding only may change
    places, but never with an alternative that is returned.

    Args:
        hidden: [R, h], any float type.
        weight: [V, h], any float type.
        targets: int64 [R], on the device of `hidden`.
        top: number of alternatives; k = min(top, V).
        decoder: a backend's own way to the logits; by default products with pieces of widened weights.
        workspace: bytes of scratch memory, half for widened weights and half for logits.

    Returns:
        Log-probabilities float32 [R] and ranks int64 [R] of the targets, token ids int64 [R, k] and
        log-probabilities float32 [R, k] of the alternatives, most likely first.

    Raises:
        StepError: a logit is not finite.
    """
    count, vocab_size = len(hidden), len(weight)
    k = min(top, vocab_size)
    # The target's logit, known before the piece of the vocabulary that holds it comes.
    mark = (hidden.float() * weight[targets].float()).sum(-1)
    if decoder is not None and k <= 1:
        tally = decoder.tally(hidden, targets, mark)
        log_total = tally.total.log_()
        logprobs = _checked(tally.own - tally.peak - log_total)
        ids, values = tally.best_id[:, None][:, :k], (tally.best - tally.peak - log_total)[:, None][:, :k]
        return logprobs, _ranks(tally.above + (tally.own <= mark), targets, ids), ids, values
    peak = hidden.new_full((count,), -math.inf, dtype=torch.float32)
    total = torch.zeros_like(peak)
    own = torch.zeros_like(peak)
    above = torch.zeros_like(targets)
    values = peak[:, None].repeat(1, k)
    ids = torch.zeros_like(values, dtype=torch.int64)
    products = [(0, vocab_size, decoder.logits)] if decoder else _products(weight, workspace // 2)
    for first, size, product in products:
        step = max(1, workspace // 2 // (4 * size))
        for rows in (slice(start, start + step) for start in range(0, count, step)):
            scores = product(hidden[rows])
            _take_own(scores, targets[rows] - first, own[rows])
            _count_above(scores, mark[rows], above[rows])
            if k:
                _merge_top(scores, first, values[rows], ids[rows])
            highest = torch.maximum(peak[rows], scores.amax(-1))
            total[rows] *= (peak[rows] - highest).exp_()
            total[rows] += scores.sub_(highest[:, None]).exp_().sum(-1)
            peak[rows] = highest
    log_total = total.log_()
    logprobs = _checked(own - peak - log_total)
    # Its own logit and the mark are two sums of the same products: it must not be above itself.
    ranks = _ranks(above + (own <= mark), targets, ids)
    return logprobs, ranks, ids, values - peak[:, None] - log_total[:, None]


def _checked(logprobs: Tensor) -> Tensor:
    if not math.isfinite(logprobs.sum().item()):
        raise StepError("the model's logits are not finite")
    return logprobs


def _products(weight: Tensor, workspace: int) -> Iterator[tuple[int, int, Product]]:
    """Yield (first token, tokens, product that gives their logits) for pieces of the vocabulary."""
    for first, piece in _pieces(weight, workspace):
        yield first, len(piece), lambda rows, piece=piece: rows.float() @ piece.t()  # type: ignore[misc]


def _pieces(weight: Tensor, workspace: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first token, weights float32 [tokens, h]) so that one widened piece fits the workspace."""
    step = max(1, workspace // (4 * weight.shape[1]))
    for first in range(0, len(weight), step):
        yield first, weight[first : first + step].float()


def _take_own(scores: Tensor, places: Tensor, own: Tensor) -> None:
    """Copy the targets' scores into `own` [rows] where their places [rows] lie in this piece."""
    inside = (places >= 0) & (places < scores.shape[1])
    found = scores.gather(1, places.clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
    own.copy_(torch.where(inside, found, own))


def _count_above(scores: Tensor, mark: Tensor, above: Tensor) -> None:
    """Add to `above` [rows] how many of a piece's scores [rows, tokens] are above the rows' marks."""
    step = max(1, COMPARED // scores.shape[1])
    # Zeros and ones as floats: several times as fast to add up as booleans, and exact to 2^24.
    flags = torch.empty_like(scores[:step])
    for first in range(0, len(scores), step):
        part = slice(first, first + step)
        found = torch.gt(scores[part], mark[part, None], out=flags[: len(mark[part])])
        above[part] += found.sum(-1).long()


def _ranks(counted: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
    """Return the ranks [R]: the place among the alternatives [R, k], or what was counted behind them."""
    k = ids.shape[1]
    listed = torch.cat([ids == targets[:, None], torch.ones_like(targets, dtype=torch.bool)[:, None]], -1)
    place = listed.int().argmax(-1)
    return torch.where(place < k, place + 1, counted.clamp(min=k + 1))


def _merge_top(scores: Tensor, first: int, values: Tensor, ids: Tensor) -> None:
    """Merge the best of a piece's scores [rows, tokens] into the best so far, in place."""
    best = scores.topk(min(values.shape[1], scores.shape[1]))
    values_both = torch.cat([values, best.values], -1)
    ids_both = torch.cat([ids, best.indices + first], -1)
    merged = values_both.topk(values.shape[1])
    values.copy_(merged.values)
    ids.copy_(ids_both.gather(1, merged.indices))
