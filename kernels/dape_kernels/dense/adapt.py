"""From scores to adapted scores of one block, forward and backward, without the static parts of these.

Three ways: `Plain`, `Network` for DAPE (`CompiledNetwork` where it can run), `Gates` for CoPE. What `forward`
keeps for `backward` is the caller's to store or to compute again. Letters: H heads, D hidden width, k kernel
length, r = k // 2, b sequences, R rows, K keys, P = K + 4r columns.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dape_kernels.bias import LEAKY_SLOPE
from dape_kernels.dense.compiled import CompiledNetwork, available
from dape_kernels.encoding import Cope, Dape, Encoding
from dape_kernels.reference import cope_bias

Kept = tuple[Tensor, ...]
# Which pairs lie above the diagonal is asked by kernels longer than 1 only.
NO_PAIRS = torch.empty(0, 0, dtype=torch.bool)


class Adapter(Protocol):
    """One layer's adaptation, which adds up the gradients of its parameters."""

    kept: int
    """How many tensors of a block `backward` wants."""
    gradients: list[Tensor]
    """In the tensors that the adapter was made of, so far."""

    def forward(
        self, scores: Tensor, query: Tensor, hidden: Tensor | None, future: Tensor
    ) -> tuple[Tensor, Kept]:
        """Return the adapted scores, which may be overwritten, and what `backward` wants.

        Args:
            scores: [H, b, R, K], scaled; may be overwritten where it is not kept.
            query: [H, b, R, d].
            hidden: what is added to the hidden values, see `Static`.
            future: which pairs [R, K] lie above the diagonal.
        """
        ...

    def backward(
        self, gradient: Tensor, query: Tensor, kept: Kept, future: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients in scores, in the hidden part and in the query beside that through the scores.

        Args:
            gradient: of the adapted scores, [H, b, R, K], zero above the diagonal.
            query, kept, future: as of `forward`.
        """
        ...


def adapter_tensors(encoding: Encoding) -> tuple[Tensor, ...]:
    """Return what `make_adapter` makes the adapter of."""
    if encoding.cope is not None:
        return (encoding.cope.table,)
    return () if encoding.dape is None else (encoding.dape.score_weight, encoding.dape.out_weight)


def make_adapter(encoding: Encoding, tensors: tuple[Tensor, ...], dtype: torch.dtype, tokens: int) -> Adapter:
    """Return a layer's adapter by the values of `tensors`, for scores of `dtype` and so many tokens."""
    if encoding.cope is not None:
        return Gates(*tensors)
    return Plain() if encoding.dape is None else _make_network(encoding.dape, tensors, dtype, tokens)


def _make_network(dape: Dape, weights: tuple[Tensor, ...], dtype: torch.dtype, tokens: int) -> Adapter:
    if available(dape, dtype, weights[0].device):
        return CompiledNetwork(dape, weights)
    return Network(dape, weights, dtype, tokens)


def adapt_scores(dape: Dape, scores: Tensor, hidden: Tensor) -> Tensor:
    """Return [A] + W2 leaky(W1_A A + hidden) of DAPE version 1, differentiable in all but the settings.

    Args:
        dape: the network, of kernel 1.
        scores: [H, b, R, K].
        hidden: [D, b, R, K], or [D, 1, R, K] for all sequences.

    Returns:
        [H, b, R, K].
    """
    adapted: Tensor = _Adapt.apply(dape, scores, hidden, dape.score_weight, dape.out_weight)  # type: ignore[no-untyped-call]
    return adapted


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dape: Dape, scores: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        adapter = _make_network(dape, weights, scores.dtype, scores.shape[-1])
        adapted, kept = adapter.forward(scores, scores, hidden, NO_PAIRS)
        ctx.save_for_backward(*weights, *kept)
        ctx.dape, ctx.shared = dape, hidden.shape[1] == 1
        return adapted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        first, second, *kept = ctx.saved_tensors
        adapter = _make_network(ctx.dape, (first, second), gradient.dtype, gradient.shape[-1])
        of_scores, of_hidden, _ = adapter.backward(gradient, gradient, tuple(kept), NO_PAIRS)
        if ctx.shared and of_hidden is not None and of_hidden.shape[1] > 1:
            of_hidden = of_hidden.sum(1, keepdim=True)
        return None, of_scores, of_hidden, *adapter.gradients


class Plain:
    """No adaptation."""

    kept = 0

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def forward(
        self,
        scores: Tensor,
        query: Tensor,  # noqa: ARG002
        hidden: Tensor | None,  # noqa: ARG002
        future: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Kept]:
        return scores, ()

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,  # noqa: ARG002
        kept: Kept,  # noqa: ARG002
        future: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return gradient, None, None


class Network:
    """[A] + W2 * leaky(W1_A * A + hidden), where * is a cross-correlation of length k along keys.

    A product with shifted views of the flattened channels is one tap for all pairs. With r > 0 the channels
    have 2r zero columns on both sides; the hidden value of key j is stored in column j + r and the result in
    column j, and what a shift takes from the next row lies in columns that are dropped.
    """

    kept = 2

    def __init__(self, dape: Dape, weights: tuple[Tensor, ...], dtype: torch.dtype, tokens: int):
        self._first, self._second = (weight.to(dtype) for weight in weights)  # [D, H, k], [H, D, k]
        self._keeps_scores = dape.keeps_scores
        self._reach = dape.kernel // 2
        # Columns of hidden values that exist: from key 0 on, by the official rule up to the last of all.
        self._columns = slice(self._reach, self._reach + tokens if dape.right_edge == "official" else None)
        wide = torch.promote_types(dtype, torch.float32)
        self.gradients = [torch.zeros_like(weight, dtype=wide) for weight in weights]

    def forward(
        self,
        scores: Tensor,
        query: Tensor,  # noqa: ARG002
        hidden: Tensor | None,
        future: Tensor,
    ) -> tuple[Tensor, Kept]:
        assert hidden is not None
        keys, channels = scores.shape[-1], scores
        if self._reach:
            margin = 2 * self._reach
            channels = functional.pad(scores.masked_fill(future, 0.0), (margin, margin))
        activated = _correlate(self._first, channels)
        activated[..., : keys + 2 * self._reach] += hidden
        self._clear_outside(functional.leaky_relu_(activated, LEAKY_SLOPE))
        adapted = _correlate(self._second, activated)[..., :keys]
        if self._keeps_scores:
            adapted += scores
        return adapted, (channels, activated)

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,  # noqa: ARG002
        kept: Kept,
        future: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        channels, activated = kept
        keys, margin = gradient.shape[-1], 2 * self._reach
        of_adapted = functional.pad(gradient, (0, 2 * margin)) if margin else gradient
        of_activated = _spread(self._second, of_adapted)
        _add_taps(self.gradients[1], of_adapted, activated)
        # The sign of the activated value is that of its input, so the result serves as both.
        before = torch.ops.aten.leaky_relu_backward(of_activated, activated, LEAKY_SLOPE, True)
        self._clear_outside(before)
        _add_taps(self.gradients[0], before, channels)
        of_scores = _spread(self._first, before)
        if margin:
            of_scores = of_scores[..., margin : margin + keys].masked_fill(future, 0.0)
        if self._keeps_scores:
            of_scores += gradient
        return of_scores, before[..., : keys + margin], None

    def _clear_outside(self, hidden: Tensor) -> None:
        if self._reach:
            hidden[..., : self._columns.start] = 0.0
            if self._columns.stop is not None:
                hidden[..., self._columns.stop :] = 0.0


def _taps(weight: Tensor, columns: int) -> list[tuple[Tensor, slice, slice]]:
    """Return the matrix [O, C] of each tap, and the targets and the sources it joins in flat columns."""
    size = columns - weight.shape[2] + 1
    return [(tap, slice(0, size), slice(s, s + size)) for s, tap in enumerate(weight.unbind(2))]


def _correlate(weight: Tensor, source: Tensor) -> Tensor:
    """Return the correlation [O, b, R, P] of channels [C, b, R, P] with a weight [O, C, k]."""
    flat = source.flatten(1)
    if weight.shape[2] == 1:
        return (weight[..., 0] @ flat).view(-1, *source.shape[1:])
    result = flat.new_zeros(len(weight), flat.shape[1])
    for tap, target, origin in _taps(weight, flat.shape[1]):
        result[:, target].addmm_(tap, flat[:, origin])
    return result.view(-1, *source.shape[1:])


def _spread(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient [C, b, R, P] in the channels, given that [O, b, R, P] of `_correlate`."""
    flat = gradient.flatten(1)
    if weight.shape[2] == 1:
        return (weight[..., 0].t() @ flat).view(-1, *gradient.shape[1:])
    result = flat.new_zeros(weight.shape[1], flat.shape[1])
    for tap, target, origin in _taps(weight, flat.shape[1]):
        result[:, origin].addmm_(tap.t(), flat[:, target])
    return result.view(-1, *gradient.shape[1:])


def _add_taps(total: Tensor, gradient: Tensor, source: Tensor) -> None:
    """Add the gradient in the weight of `_correlate` to `total` [O, C, k]."""
    flat, channels = gradient.flatten(1), source.flatten(1)
    for tap, target, origin in _taps(total, flat.shape[1]):
        tap += flat[:, target] @ channels[:, origin].t()


class Gates:
    """CoPE, in float32 or wider: its positions are sums over whole rows."""

    kept = 1

    def __init__(self, table: Tensor):
        self._table = table
        self.gradients = [torch.zeros_like(table)]

    def forward(
        self,
        scores: Tensor,
        query: Tensor,
        hidden: Tensor | None,  # noqa: ARG002
        future: Tensor,
    ) -> tuple[Tensor, Kept]:
        return scores + _gated(query, scores, self._table, future).to(scores.dtype), (scores,)

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        kept: Kept,
        future: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (query, kept[0], self._table)]
            bias = _gated(leaves[0], leaves[1], leaves[2], future)
        of_query, of_scores, of_table = torch.autograd.grad(bias, leaves, gradient.to(bias.dtype))
        self.gradients[0] += of_table
        return of_scores.add_(gradient), None, of_query


def _gated(query: Tensor, scores: Tensor, table: Tensor, future: Tensor) -> Tensor:
    return cope_bias(query.to(table.dtype), scores.to(table.dtype), future, Cope(table))
