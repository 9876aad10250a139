"""Static positional biases as functions of the query and key positions.

Each class holds the parameters of one encoding and evaluates the additive bias of every head.
Letters: H heads, n = i - j the distance from query i to key j. Distances are integers and biases are
computed in the dtype of the parameters, never in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

KERPLE_MINIMUM = 0.01
FIRE_EPSILON = 1e-6
LEAKY_SLOPE = 0.01

# First distance of T5 buckets 16 to 31 (32 buckets, maximum distance 128, causal). An integer table, so
# that no logarithm is rounded differently on another machine.
T5_BUCKET_STARTS = (16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)


class Bias(Protocol):
    """The bias that one layer adds to its scaled scores."""

    @property
    def distance_only(self) -> bool:
        """Whether the bias depends on n alone, so that one table per layer holds all of it."""
        ...

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the bias [H, *broadcast(query, key)] of integer positions with key <= query.

        Positions above the diagonal are allowed and get the bias of distance 0.
        """
        ...


def _distance(query: Tensor, key: Tensor) -> Tensor:
    return (query - key).clamp_min(0)


def _per_head(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.reshape(-1, *(1,) * like.dim())


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022), with its rule for head counts that are not powers of two."""

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / count) for h in range(count)]

    power = 2 ** int(math.log2(heads))
    return (geometric(power) + geometric(2 * power)[0::2])[:heads]


@dataclass(frozen=True, slots=True)
class Alibi:
    """b(n) = -slope * n (Press et al. 2022)."""

    slopes: Tensor  # [H]
    distance_only: bool = True

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        distance = _distance(query, key)
        return -_per_head(self.slopes, distance) * distance


@dataclass(frozen=True, slots=True)
class KerpleLog:
    """b(n) = -p * ln(1 + a * n), p and a at least 0.01 (Chi et al. 2022, logarithmic kernel)."""

    p: Tensor  # [H], any shape with H elements
    a: Tensor  # [H]
    distance_only: bool = True

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        distance = _distance(query, key)
        p = _per_head(self.p, distance).clamp_min(KERPLE_MINIMUM)
        a = _per_head(self.a, distance).clamp_min(KERPLE_MINIMUM)
        return -p * torch.log1p(a * distance)


@dataclass(frozen=True, slots=True)
class KerplePower:
    """b(n) = -a * n^p, a >= 0.01 and 0.01 <= p <= 2 (Chi et al. 2022, power kernel)."""

    p: Tensor  # [H]
    a: Tensor  # [H]
    distance_only: bool = True

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        distance = _distance(query, key)
        p = _per_head(self.p, distance).clamp(KERPLE_MINIMUM, 2.0)
        a = _per_head(self.a, distance).clamp_min(KERPLE_MINIMUM)
        # n = 0 is replaced before the power, because its derivative in p is 0 * ln(0).
        power = torch.pow(distance.clamp_min(1).to(p.dtype), p)
        return torch.where(distance > 0, -a * power, 0.0)


@dataclass(frozen=True, slots=True)
class T5:
    """b(n) = sqrt(d) * table[bucket(n)] (Raffel et al. 2020), on scores already divided by sqrt(d)."""

    table: Tensor  # [32, H]
    head_dim: int
    distance_only: bool = True

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        distance = _distance(query, key)
        starts = torch.tensor(T5_BUCKET_STARTS, device=distance.device)
        far = 15 + torch.bucketize(distance, starts, right=True)
        bucket = torch.where(distance < 16, distance, far)
        return self.table[bucket].movedim(-1, 0) * math.sqrt(self.head_dim)


@dataclass(frozen=True, slots=True)
class Sandwich:
    """b(n) = (sum_t cos(n / 10000^(2t/m)) - m/2) / (8h/H), t = 1..m/2, h = 1..H (Chi et al. 2023)."""

    heads: int
    dimension: int
    distance_only: bool = True

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        distance = _distance(query, key)
        # float64: the cosine of a distance of 16384 loses three digits in float32.
        total = torch.zeros(distance.shape, dtype=torch.float64, device=distance.device)
        for t in range(1, self.dimension // 2 + 1):
            total += torch.cos(distance.double() / 10000.0 ** (2 * t / self.dimension))
        head = torch.arange(1, self.heads + 1, device=distance.device)
        return ((total - self.dimension / 2) * self.heads / (8 * _per_head(head, distance))).float()


@dataclass(frozen=True, slots=True)
class Fire:
    """b(i, j) = MLP(psi(n) / (psi(max(i, L)) + eps)), psi(x) = ln(|c x| + 1) (Li et al. 2024).

    The normaliser holds the query position i, so beyond L the bias at one distance changes with i.
    """

    c: Tensor  # scalar
    threshold: Tensor  # scalar: L = |L_multiplier * init_L|
    hidden_weight: Tensor  # [W, 1]
    hidden_bias: Tensor  # [W]
    out_weight: Tensor  # [H, W]
    out_bias: Tensor  # [H]
    activation: Callable[[Tensor], Tensor]
    distance_only: bool = False

    def psi(self, distance: Tensor) -> Tensor:
        """Return the numerator for integer distances of any shape."""
        return torch.log(torch.abs(self.c * distance) + 1)

    def norm(self, query: Tensor) -> Tensor:
        """Return the denominator for integer query positions of any shape."""
        return self.psi(torch.maximum(query.to(self.c.dtype), self.threshold)) + FIRE_EPSILON

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        ratio = self.psi(_distance(query, key)) / self.norm(query)
        hidden = self.activation(ratio.unsqueeze(-1) * self.hidden_weight[:, 0] + self.hidden_bias)
        return functional.linear(hidden, self.out_weight, self.out_bias).movedim(-1, 0)
