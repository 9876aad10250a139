"""The definition of every encoding: plain, materialised, differentiable attention scores.

Every other backend is tested against this file, and this file against tensors made by the official
code. It stores [H, M, N] tensors freely: never use it on long input. Letters: B sequences, H heads,
N keys, M queries, which are the last M of the N positions, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dape_kernels.bias import LEAKY_SLOPE
from dape_kernels.encoding import Cope, Dape, Encoding


def reference_scores(
    query: Tensor, key: Tensor, encoding: Encoding, segments: Tensor | None = None
) -> Tensor:
    """Return the adapted scores [B, H, M, N] before the causal mask.

    Args:
        query, key: [B, H, M, d] and [B, H, N, d], rotated already where the encoding is rotary.
        encoding: the layer's score function.
        segments: int64 [B, N], where the encoding is `segmented`.
    """
    scores = query @ key.transpose(-1, -2) * encoding.scale
    if encoding.cope is not None:
        return scores + cope_bias(query, scores, _future(scores), encoding.cope)
    place = torch.arange(key.shape[2], device=key.device)[None] if segments is None else segments
    bias = encoding.static_bias(place[:, -query.shape[2] :, None], place[:, None]).transpose(0, 1)
    bias = bias.to(scores.dtype)
    if encoding.dape is None:
        return scores + bias
    return adapt(scores, bias.expand_as(scores), encoding.dape)


def adapt(scores: Tensor, bias: Tensor, dape: Dape) -> Tensor:
    """Return [A] + [B] + f(A, B) of scores and biases [B, H, M, N] (DAPE eq. 3; V2 section 3)."""
    reach = dape.kernel // 2
    weight = torch.cat([dape.score_weight, dape.bias_weight], 1).unsqueeze(2).to(scores.dtype)
    channels = torch.cat([scores, bias], 1)
    if dape.kernel > 1:
        channels = channels.tril(_diagonal(channels))
    # Right of the last key the official code has zero padding; the extended rule computes the hidden
    # columns there from the zero channels, as rows inside a longer matrix do.
    extra = reach if dape.right_edge == "extended" else 0
    channels = functional.pad(channels, (reach, reach + extra))
    hidden = functional.conv2d(channels, weight, dape.hidden_bias.to(scores.dtype))
    hidden = functional.pad(functional.leaky_relu(hidden, LEAKY_SLOPE), (reach, reach - extra))
    change = functional.conv2d(
        hidden, dape.out_weight.unsqueeze(2).to(scores.dtype), dape.out_bias.to(scores.dtype)
    )
    return change + (scores if dape.keeps_scores else 0) + (bias if dape.keeps_bias else 0)


def _diagonal(scores: Tensor) -> int:
    """Return the number of the diagonal where key and query position are equal, for `tril`."""
    return scores.shape[-1] - scores.shape[-2]


def cope_bias(query: Tensor, scores: Tensor, future: Tensor, cope: Cope) -> Tensor:
    """CoPE (Golovneva et al. 2024, eq. 3 to 5): interpolate q e[p] at p = sum of gates from j to i.

    Args:
        query: [..., M, d].
        scores: [..., M, N], scaled.
        future: which pairs [M, N] lie above the diagonal.
        cope: its table.
    """
    last = cope.table.shape[1] - 1
    gates = torch.sigmoid(scores).masked_fill(future, 0.0)
    position = gates.flip(-1).cumsum(-1).flip(-1).clamp_max(last)
    logits = query @ cope.table.to(query.dtype)
    floor, ceil = position.floor(), position.ceil()
    share = position - floor
    return logits.gather(-1, ceil.long()) * share + logits.gather(-1, floor.long()) * (1 - share)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, segments: Tensor | None = None
) -> Tensor:
    """Return causal attention [B, H, M, d] by materialising every score."""
    scores = causal(reference_scores(query, key, encoding, segments))
    return scores.softmax(-1) @ value


def causal(scores: Tensor) -> Tensor:
    """Return scores [..., M, N] with minus infinity where the key is after the query."""
    return scores.masked_fill(_future(scores), float("-inf"))


def _future(scores: Tensor) -> Tensor:
    """Return which pairs [M, N] of scores [..., M, N] lie above the diagonal."""
    pairs = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return pairs.triu(_diagonal(scores) + 1)
