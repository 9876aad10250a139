"""Linear layers with int8 weights and float activations: their definition in PyTorch.

Symmetric, one scale for each output channel, made from the weights alone. Backends with products of their own
read `weight` and `scale`. Letters: m outputs, n inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 127
"""Largest quantised magnitude: -128 is not used, so that a weight and its negative are rounded alike."""
PIECE = 1 << 22
"""Weights that are rounded at a time, unless a row has more: temporary memory is a few times as much."""


class Int8Linear(nn.Module):
    """y = x (weight * scale)^T + bias, with weights int8 [m, n] and scales float32 [m]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., m] of x [..., n], in the dtype of x, which the dequantised weights are rounded to."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantised().to(x.dtype), bias)

    def dequantised(self) -> Tensor:
        """Return the weights as float32 [m, n]."""
        return self.weight.float() * self.scale[:, None]


Linear = nn.Linear | Int8Linear


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights [m, n] of any float type as int8 [m, n], and their scales float32 [m].

    The largest magnitude of a row becomes 127; every weight is rounded to the nearest multiple of its scale.

    Raises:
        ValueError: a weight is not a finite number, or too large for float32.
    """
    rounded = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), device=weight.device)
    step = max(1, PIECE // weight.shape[1])
    for first in range(0, len(weight), step):
        piece = weight[first : first + step].float()
        low, high = piece.aminmax(dim=-1)
        own = torch.maximum(high, -low) / LEVELS
        if not torch.isfinite(own).all():
            raise ValueError("a weight is not a finite number")
        scale[first : first + step] = own
        # Rows of zeros, or of so small numbers that their scale is zero, stay zeros.
        factor = torch.where(own > 0, own.reciprocal(), 0).nan_to_num_(posinf=0)
        rounded[first : first + step] = (piece * factor[:, None]).round_()
    return rounded, scale
