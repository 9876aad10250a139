"""An `Encoding` as the C++ kernels read it: scores in units of log 2, biases tabulated by distance.

Scores here are scores times log2(e), so that weights are powers of two. What is linear in the biases (the
hidden channels W1_B b + b1 and the residual ones [b] + b2) is folded into one set of C channels, which are
tables of the distance or, for FIRE, piecewise linear in one number. Letters: H heads, D hidden width, S
segments of the latter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from dape_kernels.bias import LEAKY_SLOPE, Fire
from dape_kernels.cpu.library import PANEL, EncodingStruct
from dape_kernels.encoding import Dape, Encoding

LOG2_E = math.log2(math.e)
# The slope left of 0 of the activations that make FIRE piecewise linear.
FIRE_SLOPES = {functional.relu: 0.0, functional.leaky_relu: LEAKY_SLOPE}
# Zeros behind distance 0: what a tile reads of columns after the query.
FUTURE = 256
# Rows of a table lie so many floats apart, modulo a page: the strips of a tile, five lines of each row, then
# lie in different sets of the first-level cache.
PAGE, STEP = 1024, 80


class PreparedEncoding:
    """The weights and tables of one layer; the tables grow with the longest context asked for."""

    @torch.no_grad()
    def __init__(self, encoding: Encoding):
        # In float64, so that rounding to float32 happens once.
        self._encoding = encoding = encoding.with_tensors([t.double() for t in encoding.tensors])
        self._length = 0
        self._kept: dict[str, Tensor] = {}  # what the struct points to
        self._struct = EncodingStruct(
            query_scale=encoding.scale * LOG2_E, kernel=1, keeps_scores=True, keeps_bias=True
        )
        if encoding.dape is not None:
            self._add_network(encoding.dape)
        self._weight, self._offset = _channels(encoding)
        self._struct.positional.channels = len(self._weight)
        if isinstance(encoding.bias, Fire):
            self._add_segments(encoding.bias)

    @torch.no_grad()
    def struct(self, length: int) -> EncodingStruct:
        """Return the struct for contexts up to `length`; valid as long as this object lives."""
        if length > self._length and len(self._weight):
            # Twice as far, so that a growing context does not make a table for every token.
            self._length = max(length, 2 * self._length)
            self._tabulate(self._length)
        return self._struct

    @property
    def tensors(self) -> list[Tensor]:
        """What the struct of today points to: a longer context replaces the tables."""
        return list(self._kept.values())

    def _keep(self, name: str, values: Tensor) -> int:
        """Return the address of a copy of `values` in float32, aligned to a cache line."""
        self._kept[name] = values.float().contiguous()
        return self._kept[name].data_ptr()

    def _add_network(self, dape: Dape) -> None:
        """Set the weights: of scores, which come times log2(e), and to scores, which go so."""
        struct, inputs = self._struct, [dape.score_weight]
        if dape.kernel > 1:
            if self._encoding.bias is not None:
                inputs.append(dape.bias_weight)
            struct.hidden_bias = self._keep("hidden_bias", dape.hidden_bias)
            struct.out_bias = self._keep("out_bias", dape.out_bias * LOG2_E)
        first = torch.cat(inputs, 1)
        struct.width, struct.inputs, struct.kernel = first.shape
        struct.keeps_scores, struct.keeps_bias = dape.keeps_scores, dape.keeps_bias
        struct.first = self._keep("first", first.permute(2, 1, 0) / LOG2_E)
        struct.second = self._keep("second", dape.out_weight.permute(2, 1, 0) * LOG2_E)

    def _add_segments(self, fire: Fire) -> None:
        """Set the pieces of FIRE's network, which is linear between the knots of its hidden units."""
        weight, bias = fire.hidden_weight[:, 0], fire.hidden_bias
        knot = -bias / weight
        # The normalised distance lies in [0, 1): no other knot divides anything.
        knot = knot[(knot > 0) & (knot < 1)].unique()
        ends = torch.cat([knot.new_zeros(1), knot, knot.new_ones(1)])
        middle = (ends[1:] + ends[:-1]) / 2
        if not len(knot):  # the kernels want one, so both sides of one out of reach are the same
            knot, middle = knot.new_tensor([1e30]), middle.expand(2)
        active = middle[:, None] * weight + bias > 0  # [S, hidden units]
        gain = torch.where(active, 1.0, FIRE_SLOPES[fire.activation]).double()
        slope = (gain * weight) @ fire.out_weight.t()
        offset = (gain * bias) @ fire.out_weight.t() + fire.out_bias
        positional = self._struct.positional
        positional.knots = len(knot)
        positional.knot = self._keep("knot", knot)
        positional.slope = self._keep("slope", slope @ self._weight.t())
        positional.offset = self._keep("offset", offset @ self._weight.t() + self._offset)

    def _tabulate(self, length: int) -> None:
        """Set what depends on the distance or the position, for those below `length`."""
        encoding, positional = self._encoding, self._struct.positional
        distance = torch.arange(length)
        if isinstance(encoding.bias, Fire):
            positional.inverse_norm = self._keep("inverse_norm", 1 / encoding.bias.norm(distance))
            positional.ramp = self._reverse("ramp", encoding.bias.psi(distance)[None]).data_ptr()
        else:
            bias = encoding.static_bias(distance, torch.zeros_like(distance)).double()
            table = self._reverse("table", torch.addmm(self._offset[:, None], self._weight, bias))
            positional.table, positional.stride = table.data_ptr(), table.stride(0)
        positional.origin = length - 1

    def _reverse(self, name: str, channels: Tensor) -> Tensor:
        """Return channels [C, distances] with distances falling to 0 and zeros behind, in float32."""
        length = channels.shape[1]
        stride = length + FUTURE
        stride += (STEP - stride) % PAGE
        rows = -(-len(channels) // PANEL) * PANEL  # matrix units read whole tiles
        self._kept[name] = table = torch.zeros(rows, stride)
        table[: len(channels), :length] = channels.flip(1)
        return table


def _channels(encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Return weight [C, H] and offset [C] by which the channels come from the biases [H]."""
    heads, dape = encoding.heads, encoding.dape
    residual = torch.eye(heads, dtype=torch.float64) * LOG2_E
    if dape is not None and dape.kernel == 1:
        weight = torch.cat([dape.bias_weight[..., 0], residual * dape.keeps_bias])
        return weight, torch.cat([dape.hidden_bias, dape.out_bias * LOG2_E])
    weight = residual if encoding.bias is not None else residual[:0]
    return weight, torch.zeros(len(weight), dtype=torch.float64)
