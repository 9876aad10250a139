"""An `Encoding` as the Triton kernels read it: scores in units of log 2, heads in groups of 16.

Letters: H heads, G heads of a group, D hidden width (rounded up), k kernel length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dape_kernels.bias import LEAKY_SLOPE, Alibi, Fire
from dape_kernels.encoding import Dape, Encoding

LOG2_E = math.log2(math.e)
GROUP = 16
# Tensor cores multiply at least so many numbers.
SMALLEST = 16
# The slope left of 0 of FIRE's activations.
FIRE_SLOPES = {functional.relu: 0.0, functional.leaky_relu: LEAKY_SLOPE}
NONE, LINEAR, TABLE, FIRE = range(4)


def padded(size: int) -> int:
    """Return the smallest power of two that is at least `size` and that tensor cores take."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Network:
    """The weights of DAPE for one dtype of products."""

    first: Tensor  # [groups, 2, k, G, D]
    hidden_bias: Tensor  # float32 [D]
    second: Tensor  # [groups, k, D, G]
    out_bias: Tensor  # float32 [groups * G]


class PreparedEncoding:
    """The parameters of one layer on one device; a table grows with the longest context asked for."""

    @torch.no_grad()
    def __init__(self, encoding: Encoding, device: torch.device):
        self._encoding = encoding
        self._device = device
        self._networks: dict[torch.dtype, Network] = {}
        self._length = 0
        self.groups = -(-encoding.heads // GROUP)
        self.scale = encoding.scale * LOG2_E
        self.kind, self.units = NONE, SMALLEST
        self.bias_heads = self.bias_units = torch.zeros(1, device=device)
        bias = encoding.bias
        if isinstance(bias, Alibi):
            self.kind = LINEAR
            self.bias_heads = self._heads(-bias.slopes.double()[None] * LOG2_E)
        elif isinstance(bias, Fire):
            self.kind = FIRE
            self._add_fire(bias)
        elif bias is not None:
            self.kind = TABLE

    def _add_fire(self, fire: Fire) -> None:
        width = len(fire.hidden_bias)
        self.units = padded(width)
        hidden = torch.stack([fire.hidden_weight[:, 0], fire.hidden_bias]).float()
        head = torch.stack(
            [fire.c.float(), fire.threshold.float(), fire.c.new_tensor(FIRE_SLOPES[fire.activation])]
        )
        units = functional.pad(hidden, (0, self.units - width)).flatten()
        self.bias_units = torch.cat([head.cpu(), units.cpu()]).to(self._device)
        weight = functional.pad(fire.out_weight.double().t(), (0, 0, 0, self.units - width))
        self.bias_heads = self._heads(torch.cat([weight, fire.out_bias.double()[None]]) * LOG2_E)

    def _heads(self, rows: Tensor) -> Tensor:
        """Return rows [X, H] in float32, padded to whole groups and contiguous on the device."""
        return (
            functional.pad(rows, (0, self.groups * GROUP - rows.shape[1]))
            .float()
            .contiguous()
            .to(self._device)
        )

    @torch.no_grad()
    def reserve(self, length: int) -> None:
        """Tabulate the bias for contexts up to `length`, where it is a table."""
        if self.kind != TABLE or length <= self._length:
            return
        # Twice as far, so that a growing context does not make a table for every token.
        self._length = max(length, 2 * self._length)
        # Where the parameters lie, which need not be where the kernels run.
        tensors = self._encoding.tensors
        distance = torch.arange(self._length, device=tensors[0].device if tensors else self._device)
        bias = self._encoding.static_bias(distance, torch.zeros_like(distance))
        self.bias_heads = self._heads(bias.double().t() * LOG2_E)

    def network(self, dtype: torch.dtype) -> Network | None:
        """Return the weights for products of numbers of `dtype`, None without DAPE."""
        dape = self._encoding.dape
        if dape is None:
            return None
        if dtype not in self._networks:
            self._networks[dtype] = self._fold(dape, dtype)
        return self._networks[dtype]

    @property
    def settings(self) -> dict[str, Any]:
        """What of the encoding is compiled into the kernel, by the names of its parameters."""
        dape = self._encoding.dape
        return {
            "HEADS": self._encoding.heads,
            "SIZE": self._encoding.head_dim,
            "DIM": padded(self._encoding.head_dim),
            "GROUPS": self.groups,
            "WIDTH": 0 if dape is None else padded(len(dape.hidden_bias)),
            "TAPS": 1 if dape is None else dape.kernel,
            "KEEPS_SCORES": dape is None or dape.keeps_scores,
            "KEEPS_BIAS": dape is None or dape.keeps_bias,
            "FEEDS_BIAS": self.kind != NONE and dape is not None and bool(dape.bias_weight.any()),
            "OFFICIAL": dape is not None and dape.right_edge == "official",
            "KIND": self.kind,
            "UNITS": self.units,
        }

    @torch.no_grad()
    def _fold(self, dape: Dape, dtype: torch.dtype) -> Network:
        """Lay out the weights: of scores, which come times log2(e), and to scores, which go so."""
        width, rest = padded(len(dape.hidden_bias)), self.groups * GROUP - self._encoding.heads
        spare = width - len(dape.hidden_bias)
        first = torch.stack([dape.score_weight, dape.bias_weight]).double() / LOG2_E  # [2, D, H, k]
        first = functional.pad(first, (0, 0, 0, rest, 0, spare)).permute(2, 0, 3, 1)  # [H, 2, k, D]
        first = first.unflatten(0, (self.groups, GROUP)).permute(0, 2, 3, 1, 4)
        second = functional.pad(dape.out_weight.double() * LOG2_E, (0, 0, 0, spare, 0, rest))  # [H, D, k]
        second = second.unflatten(0, (self.groups, GROUP)).permute(0, 3, 2, 1)

        def place(weights: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
            return weights.to(self._device, kind).contiguous()

        return Network(
            place(first, dtype),
            place(functional.pad(dape.hidden_bias, (0, spare))),
            place(second, dtype),
            place(functional.pad(dape.out_bias.double() * LOG2_E, (0, rest))),
        )
