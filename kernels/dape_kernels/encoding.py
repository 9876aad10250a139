"""What the attention kernels need to know of one layer's positional encoding.

DAPE in all its published forms is one canonical function with different weights (see `Dape`), so a
kernel implements one formula, not one per form. Letters: H heads, D hidden width, k kernel length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from dape_kernels.bias import Bias
from dape_kernels.memo import Memo

RightEdge = Literal["extended", "official"]
Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Form:
    """How one published form of DAPE combines scores A and biases B: its inputs and its residual."""

    feeds_scores: bool
    feeds_bias: bool
    feeds_sum: bool  # one set of H channels, A + B, instead of two sets
    keeps_scores: bool
    keeps_bias: bool


FORMS = {
    "concat_residual": Form(True, True, False, True, True),  # A + B + f(A, B): V1 eq. 3
    "concat": Form(True, True, False, True, False),  # A + f(A, B): V1 eq. 2
    "add_residual": Form(True, True, True, True, True),  # A + B + f(A + B): V1 fig. 5
    "bias_only": Form(False, True, False, True, True),  # A + B + f(B): V1 table 7
    "score_only": Form(True, False, False, True, False),  # A + f(A): V2, NoPE and RoPE
    "bias_map": Form(False, True, False, True, False),  # A + f(B)
    "function_only": Form(True, True, False, False, False),  # f(A, B)
}


@dataclass(frozen=True, slots=True)
class Dape:
    """The network that turns scores A and biases B of all heads into the adapted scores.

    score = [A] + [B] + W2 * leaky(W1_A * A + W1_B * B + b1) + b2     (DAPE eq. 2 and 3)

    where * is a cross-correlation of length k along keys (k = 1: a plain product, DAPE version 1;
    k = 3, 5: version 2) and the bracketed residuals depend on the form.
    """

    score_weight: Tensor  # W1_A [D, H, k]; zero where the form feeds no scores
    bias_weight: Tensor  # W1_B [D, H, k]; zero where the form feeds no bias
    hidden_bias: Tensor  # b1 [D]
    out_weight: Tensor  # W2 [H, D, k]
    out_bias: Tensor  # b2 [H]
    keeps_scores: bool = True
    keeps_bias: bool = True
    # Whether the hidden columns right of the last key exist ("extended": prefill, chunks and decode
    # agree) or are zero padding ("official": the published full-matrix code). Matters for k > 1 only.
    right_edge: RightEdge = "extended"

    @property
    def kernel(self) -> int:
        """Length k of the kernel along keys, odd."""
        return self.score_weight.shape[-1]


def dape_from_parameters(
    form: str,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    right_edge: RightEdge = "extended",
) -> Dape:
    """Fold the parameters of one published form into the canonical function.

    Args:
        form: a key of `FORMS`.
        hidden_weight: [D, C] or [D, C, 1, k], C = 2H channels (scores first) or H, by the form.
        hidden_bias: [D].
        out_weight: [H, D] or [H, D, 1, k].
        out_bias: [H].
        right_edge: see `Dape.right_edge`.
    """
    rule = FORMS[form]
    if hidden_weight.dim() == 2:
        hidden_weight, out_weight = hidden_weight[..., None, None], out_weight[..., None, None]
    hidden_weight, out_weight = hidden_weight.squeeze(2), out_weight.squeeze(2)
    heads = out_weight.shape[0]
    if rule.feeds_scores and rule.feeds_bias and not rule.feeds_sum:
        score_weight, bias_weight = hidden_weight[:, :heads], hidden_weight[:, heads:]
    else:
        zero = torch.zeros_like(hidden_weight)
        score_weight = hidden_weight if rule.feeds_scores else zero
        bias_weight = hidden_weight if rule.feeds_bias else zero
    return Dape(
        score_weight,
        bias_weight,
        hidden_bias,
        out_weight,
        out_bias,
        keeps_scores=rule.keeps_scores,
        keeps_bias=rule.keeps_bias,
        right_edge=right_edge,
    )


@dataclass(frozen=True, slots=True)
class Cope:
    """CoPE (Golovneva et al. 2024): a bias read from `table` at a content-dependent position."""

    table: Tensor  # [d, positions], shared by heads


def tensors_of(part: object) -> tuple[Tensor, ...]:
    """Return the tensors of a dataclass, none of None, in the order of its fields."""
    values = () if part is None else (getattr(part, field.name) for field in fields(cast("Any", part)))
    return tuple(value for value in values if isinstance(value, Tensor))


def with_tensors(part: Part, tensors: Iterable[Tensor]) -> Part:
    """Return a dataclass with other tensors, which come in the order of `tensors_of`."""
    if part is None:
        return part
    names = [f.name for f in fields(cast("Any", part)) if isinstance(getattr(part, f.name), Tensor)]
    return cast("Part", replace(cast("Any", part), **dict(zip(names, tensors, strict=False))))


@dataclass(frozen=True, slots=True)
class Tables:
    """The parts of the score that depend on the distance only, for every distance below a limit.

    The table identity: with hidden(n) = W1_B b(n) + b1 and residual(n) = [b(n)] + b2, the score of a
    pair is [A] + residual(n) + W2 leaky(W1_A A + hidden(n)).
    """

    hidden: Tensor | None  # [D, distances], fp32; None without DAPE
    residual: Tensor  # [H, distances], fp32


@dataclass(frozen=True, slots=True)
class Encoding:
    """One layer's score function: scale, static bias, DAPE. Rotary is applied to q and k before."""

    heads: int
    head_dim: int
    bias: Bias | None = None
    dape: Dape | None = None
    cope: Cope | None = None
    segmented: bool = False
    """Whether the bias is of the segments that query and key lie in (BiPE) instead of their positions."""
    tables: Tables | None = field(default=None, repr=False)
    memo: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)
    """What backends prepare for the layer."""

    @property
    def scale(self) -> float:
        """Factor 1 / sqrt(d) of q k, applied before any bias and before DAPE."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def tabular(self) -> bool:
        """Whether the table identity holds: k = 1 and a bias of the distance only."""
        pointwise = self.dape is None or self.dape.kernel == 1
        by_distance = self.bias is None or (self.bias.distance_only and not self.segmented)
        return pointwise and self.cope is None and by_distance

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the static bias and the DAPE network are made of."""
        return tensors_of(self.bias) + tensors_of(self.dape)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Encoding:
        """Return this encoding with other tensors in the order of `tensors`, and without tables."""
        left = iter(tensors)
        return replace(
            self, bias=with_tensors(self.bias, left), dape=with_tensors(self.dape, left), tables=None
        )

    def static_bias(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the static bias [H, *broadcast(query, key)] of integer positions; zero for NoPE."""
        if self.bias is None:
            shape = torch.broadcast_shapes(query.shape, key.shape)
            dtype = torch.float32 if self.dape is None else self.dape.hidden_bias.dtype
            return torch.zeros(self.heads, *shape, dtype=dtype, device=query.device)
        return self.bias(query, key)

    def split(self, bias: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return W1_B bias + b1 [D, ...] and [bias] + b2 [H, ...] of a static bias [H, ...] (k = 1)."""
        if self.dape is None:
            return None, bias
        dape = self.dape
        flat = bias.flatten(1).to(dape.hidden_bias.dtype)
        hidden = torch.addmm(dape.hidden_bias[:, None], dape.bias_weight[..., 0], flat)
        residual = (flat if dape.keeps_bias else torch.zeros_like(flat)) + dape.out_bias[:, None]
        return hidden.unflatten(1, bias.shape[1:]), residual.unflatten(1, bias.shape[1:])

    def with_tables(self, length: int, device: torch.device | None = None) -> Encoding:
        """Return this encoding with its tables for distances 0 to length - 1, if it has any."""
        if not self.tabular:
            return self
        if device is None and self.dape is not None:
            device = self.dape.hidden_bias.device
        distance = torch.arange(length, device=device)
        hidden, residual = self.split(self.static_bias(distance, torch.zeros_like(distance)))
        return replace(self, tables=Tables(hidden, residual))
