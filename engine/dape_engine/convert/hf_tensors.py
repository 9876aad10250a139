"""What the Hugging Face families compute or store otherwise. Letters: H heads, d head size, h hidden size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bloom_slopes(heads: int) -> Tensor:
    """Return BLOOM's slopes [H], powers in float32 of a rounded base."""
    power = 2 ** math.floor(math.log2(heads))

    def powers(count: int, exponents: range) -> Tensor:
        return torch.tensor(2.0 ** (-8 / count), dtype=torch.float32) ** torch.tensor(exponents)

    rest = powers(2 * power, range(1, 2 * (heads - power) + 1, 2))
    return torch.cat([powers(power, range(1, power + 1)), rest])


def mpt_slopes(heads: int, bias_max: float) -> Tensor:
    """Return MPT's slopes [H]: 2^(-bias_max t / P), t = 1..P, P the power of two from H on.

    Where P is above H, those of even t go first.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** -(torch.arange(1, power + 1, dtype=torch.float32) * (bias_max / power))
    return slopes if power == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def interleave(qkv: Tensor, heads: int, factor: float, transposed: bool = False) -> Tensor:
    """Bring [3, H, d] outputs into the order [H, 3, d], with queries multiplied by a factor.

    Args:
        qkv: weights [3h, h], or [h, 3h] where they are `transposed`, or biases [3h].
        heads: H.
        factor: 1, or what makes up for another scale of the scores.
        transposed: whether the inputs come first.
    """
    rows = qkv.t() if transposed else qkv
    parts: Tensor = rows.unflatten(0, (3, heads, -1)).transpose(0, 1).clone()
    if factor != 1:
        parts[:, 0] *= factor
    return parts.flatten(0, 2)
