"""One layer's positional parameters, under the names of the official checkpoints.

The module owns parameters only; it hands the kernels an `Encoding` made from their present values,
so that training differentiates through it and serving tabulates it once.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dape_engine.config import WITHOUT_BIAS, DapeConfig, PositionConfig
from dape_kernels.bias import (
    LEAKY_SLOPE,
    T5,
    Alibi,
    Bias,
    Fire,
    KerpleLog,
    KerplePower,
    Sandwich,
    alibi_slopes,
)
from dape_kernels.encoding import FORMS, Cope, Encoding, dape_from_parameters

T5_BUCKETS = 32
# YaRN: turns in the train length up to which a frequency is divided, and from which on it stays as it is.
YARN_SLOW, YARN_FAST = 1, 32


class PositionalEncoding(nn.Module):
    """The static encoding and the DAPE network of one layer.

    Parameters carry the official names: `slopes`, `bias_p`, `bias_a`, `c`, `init_L`, `L_multiplier`,
    `mlp.*` (FIRE), `weight` (T5), `pos_emb` (CoPE) and `mlp2.*` (DAPE).
    """

    # Which of these exist depends on the kind and on whether there is a DAPE network.
    slopes: Tensor
    bias_p: Tensor
    bias_a: Tensor
    c: Tensor
    L_multiplier: Tensor
    init_L: Tensor
    weight: nn.Parameter
    pos_emb: Tensor
    mlp: nn.Sequential
    mlp2: nn.Sequential

    def __init__(self, position: PositionConfig, dape: DapeConfig | None, heads: int, head_dim: int):
        super().__init__()
        self.position = position
        self.dape_config = dape
        self.heads = heads
        self.head_dim = head_dim
        match position.kind:
            case "alibi" | "bipe":
                self.register_buffer("slopes", torch.tensor(alibi_slopes(heads)))
            case "kerple" | "kerple_power":
                self.bias_p = nn.Parameter(torch.rand(heads, 1, 1) * 2)
                self.bias_a = nn.Parameter(torch.rand(heads, 1, 1))
            case "fire":
                self.c = nn.Parameter(torch.tensor(0.1))
                self.L_multiplier = nn.Parameter(torch.tensor(1.0))
                self.register_buffer("init_L", torch.tensor(position.init_length))
                self.mlp = nn.Sequential(
                    nn.Linear(1, position.mlp_width),
                    nn.ReLU() if dape is None else nn.LeakyReLU(LEAKY_SLOPE),
                    nn.Linear(position.mlp_width, heads),
                )
            case "t5":
                self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(T5_BUCKETS, heads)))
            case "cope":
                self.pos_emb = nn.Parameter(torch.zeros(1, head_dim, position.max_positions))
        if dape is not None:
            self.mlp2 = self._dape_network(dape)

    def _dape_network(self, dape: DapeConfig) -> nn.Sequential:
        rule = FORMS[dape.form]
        both = rule.feeds_scores and rule.feeds_bias and not rule.feeds_sum
        has_bias = self.position.kind not in WITHOUT_BIAS
        channels = 2 * self.heads if both and has_bias else self.heads
        if dape.version == 1:
            return nn.Sequential(
                nn.Linear(channels, dape.width), nn.LeakyReLU(LEAKY_SLOPE), nn.Linear(dape.width, self.heads)
            )
        size, padding = (1, dape.kernel), (0, dape.kernel // 2)
        return nn.Sequential(
            nn.Conv2d(channels, dape.width, size, padding=padding),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(dape.width, self.heads, size, padding=padding),
        )

    def encoding(self) -> Encoding:
        """Return the kernels' view of the present parameter values, in float32 or wider."""
        dape = None
        if self.dape_config is not None:
            form = self.dape_config.form
            if self.position.kind in WITHOUT_BIAS:
                form = "score_only"
            dape = dape_from_parameters(form, *_two_layers(self.mlp2), right_edge=self.dape_config.right_edge)
        cope = Cope(_wide(self.pos_emb)[0]) if self.position.kind == "cope" else None
        segmented = self.position.kind == "bipe"
        return Encoding(self.heads, self.head_dim, self._bias(), dape, cope, segmented)

    def _bias(self) -> Bias | None:
        match self.position.kind:
            case "alibi" | "bipe":
                return Alibi(_wide(self.slopes))
            case "kerple":
                return KerpleLog(_wide(self.bias_p), _wide(self.bias_a))
            case "kerple_power":
                return KerplePower(_wide(self.bias_p), _wide(self.bias_a))
            case "fire":
                activation = functional.relu if self.dape_config is None else functional.leaky_relu
                threshold = (_wide(self.L_multiplier) * self.init_L).abs()
                return Fire(_wide(self.c), threshold, *_two_layers(self.mlp), activation)
            case "t5":
                return T5(_wide(self.weight), self.head_dim)
            case "sandwich":
                return Sandwich(self.heads, self.position.dimension)
        return None


def _two_layers(network: nn.Sequential) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight and bias of the first and the last layer of a network of two."""
    first, last = cast("nn.Linear", network[0]), cast("nn.Linear", network[2])
    return _wide(first.weight), _wide(first.bias), _wide(last.weight), _wide(last.bias)


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged where it is wider: biases are never half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Rotary(nn.Module):
    """RoPE (Su et al. 2021) in the half-split pairing of GPT-NeoX, on a leading part of the head.

    With YaRN (Peng et al. 2024) at a factor s, frequencies of fewer than one turn in the train length are
    divided by s, those of more than 32 turns stay, and those between are mixed; q and k are both multiplied
    by 0.1 ln(s) + 1.
    """

    def __init__(self, position: PositionConfig, head_dim: int, train_length: int):
        super().__init__()
        self.size = int(head_dim * position.fraction)
        self.base = position.base
        self.train_length = train_length
        self.yarn_factor = position.yarn_factor
        self.temperature = 1.0 if self.yarn_factor is None else 0.1 * math.log(self.yarn_factor) + 1

    def forward(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k [..., tokens, H, d] at integer positions [tokens]; angles are fp32."""
        angle = positions.float()[:, None] / self.periods(positions.device)
        angle = torch.cat([angle, angle], -1)[:, None]
        cos, sin = angle.cos(), angle.sin()
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        return (query, key) if self.temperature == 1 else (query * self.temperature, key * self.temperature)

    def periods(self, device: torch.device) -> Tensor:
        """Return the tokens per radian of each pair of elements, fp32."""
        exponent = torch.arange(0, self.size, 2, device=device, dtype=torch.float32) / self.size
        period = self.base**exponent
        if self.yarn_factor is None:
            return period
        turns = self.train_length / (2 * math.pi * period)
        kept = ((turns - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
        return period / ((1 - kept) / self.yarn_factor + kept)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    first, second = x[..., : size // 2], x[..., size // 2 : size]
    turned = x[..., :size] * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(x.dtype), x[..., size:]], -1)


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Return sines then cosines [..., size] of integer positions, base 10000 (Vaswani et al. 2017)."""
    exponent = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angle = positions.float()[..., None] / 10000.0**exponent
    return torch.cat([angle.sin(), angle.cos()], -1)
