"""What the static encoding adds to the pairs of a block, and the way of gradients back to its parameters.

Two ways: tables of the distance (`Tabulated`), and evaluation of the bias for every block (`Evaluated`). The
parts of a block are the residual [H, b, R, K] that is added to the adapted scores and, with DAPE, the hidden
part [D, b, R, K + 2r] that is added before the activation. Letters: H heads, D hidden width, k kernel length,
r = k // 2, b sequences of a block (1: the same for all), R rows, K keys, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dape_kernels.dense.blocks import Block
from dape_kernels.encoding import Dape, Encoding


class Static(Protocol):
    """The static parts of one layer."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the parts are made of; gradients are wanted of those that require them."""
        ...

    @property
    def per_sequence(self) -> bool:
        """Whether the parts differ between sequences."""
        ...

    def parts(self, tensors: Sequence[Tensor], block: Block) -> list[Tensor]:
        """Return the residual and, with DAPE, the hidden part, by the values of `tensors`.

        What lies above the diagonal has any finite value. Shapes broadcast to those of the module's head.
        """
        ...

    def gradients(
        self, tensors: Sequence[Tensor], block: Block, of_parts: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return the gradients in `tensors`, given those of the parts in full shape."""
        ...


def static_parts(encoding: Encoding, tokens: int, segments: Tensor | None, device: torch.device) -> Static:
    """Return the static parts of a layer for sequences of `tokens` tokens; see `dense_attention`."""
    if encoding.tabular:
        return Tabulated(encoding, tokens, device)
    return Evaluated(encoding, torch.arange(tokens, device=device)[None] if segments is None else segments)


class Tabulated:
    """Rows of the tables of the distance, one as the next but for a shift."""

    per_sequence = False

    def __init__(self, encoding: Encoding, tokens: int, device: torch.device):
        tables = encoding.with_tables(tokens, device).tables
        assert tables is not None
        self.tensors: tuple[Tensor, ...] = (tables.residual,)
        if tables.hidden is not None:
            self.tensors += (tables.hidden,)

    def parts(self, tensors: Sequence[Tensor], block: Block) -> list[Tensor]:
        return [_look_up(table, block) for table in tensors]

    def gradients(
        self, tensors: Sequence[Tensor], block: Block, of_parts: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        seen = block.rows.stop
        return [
            functional.pad(_sum_diagonals(gradient[:, 0, :, :seen]), (0, table.shape[1] - seen))
            for table, gradient in zip(tensors, of_parts, strict=True)
        ]


def _look_up(table: Tensor, block: Block) -> Tensor:
    """Return table[:, i - j], [C, 1, R, K], of a table [C, N]; zero above the diagonal."""
    rows, seen, keys = block.rows.stop - block.rows.start, block.rows.stop, block.keys.stop
    strip = functional.pad(table[:, :seen].flip(1), (0, keys - seen + rows - 1))
    view = strip.as_strided((len(strip), 1, rows, keys), (strip.shape[1], 0, 1, 1))
    return view.flip(2).contiguous()  # flip keeps an order of strides that would make additions slow


def _sum_diagonals(gradient: Tensor) -> Tensor:
    """Return the sums [C, K] of gradients [C, R, K] over the pairs of each distance 0 to K - 1.

    The last row and the last column are of the same position. With the columns reversed, row r has distance n
    in column n + R - 1 - r, so that rows which each lie one place further right have it in one column.
    """
    _, rows, keys = gradient.shape
    skewed = functional.pad(gradient.flip(2), (0, rows)).flatten(1)[:, : rows * (keys + rows - 1)]
    return skewed.view(len(skewed), rows, -1).sum(1)[:, rows - 1 :]


class Evaluated:
    """The bias as a function of both positions, computed anew wherever it is needed.

    Biases of the query's position (FIRE), of segments (BiPE), and all under DAPE version 2, whose hidden
    values left of distance 0 and near the first key are of no table.
    """

    def __init__(self, encoding: Encoding, places: Tensor):
        self._encoding = encoding
        self._places = places  # [B, N], or [1, N] where all sequences have the same
        self.per_sequence = encoding.segmented
        self.tensors = encoding.tensors

    def parts(self, tensors: Sequence[Tensor], block: Block) -> list[Tensor]:
        encoding = self._encoding.with_tensors(tensors)
        places = self._places[block.sequences] if self.per_sequence else self._places
        bias = encoding.static_bias(places[:, block.rows, None], places[:, None, block.keys])
        if encoding.dape is not None and encoding.dape.kernel > 1:
            return _convolved(encoding.dape, bias, block)
        hidden, residual = encoding.split(bias)
        return [residual] if hidden is None else [residual, hidden]

    def gradients(
        self, tensors: Sequence[Tensor], block: Block, of_parts: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            parts = self.parts(leaves, block)
        return torch.autograd.grad(parts, leaves, list(of_parts), allow_unused=True)


def _convolved(dape: Dape, bias: Tensor, block: Block) -> list[Tensor]:
    """Return the parts of a bias [H, b, R, K], which is zero above the diagonal and outside the keys."""
    bias = bias.to(dape.hidden_bias.dtype).masked_fill(block.future(bias.device), 0.0)
    margin = 2 * (dape.kernel // 2)
    channels = functional.pad(bias.transpose(0, 1), (margin, margin))
    hidden = functional.conv2d(channels, dape.bias_weight.unsqueeze(2), dape.hidden_bias)
    residual = bias if dape.keeps_bias else torch.zeros_like(bias)
    return [residual + dape.out_bias[:, None, None, None], hidden.transpose(0, 1)]
