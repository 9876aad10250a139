"""From plain to adapted scores, one tile of all heads at a time.

Three ways: `Pointwise` for static biases and DAPE with k = 1, `Convolved` for DAPE with k > 1, `Contextual`
for CoPE. Letters: H heads, D hidden width, k kernel length, G lanes, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dape_kernels.bias import LEAKY_SLOPE, Fire
from dape_kernels.chunked.tile import Tile
from dape_kernels.encoding import Cope, Dape, Encoding


class Scratch:
    """Named buffers that the tiles of one group use in turn."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self.device = device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the buffer `name` as a contiguous tensor of this shape, with any content."""
        size = prod(shape)
        if name not in self._flat or len(self._flat[name]) < size:
            self._flat[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._flat[name][:size].view(shape)


class Scorer(Protocol):
    """Adapts the scores of the tiles of one group, which come from the diagonal backwards."""

    channels: int
    """Size of the score buffer: H, and as many more as the scorer wants to fill."""

    def __call__(self, tile: Tile, scores: Tensor) -> Tensor:
        """Return the adapted and masked scores [H, G, R, keys].

        Args:
            tile: which pairs they are.
            scores: [channels, G, R, width] with the scaled scores in the first H; is overwritten.
        """
        ...


def make_scorer(encoding: Encoding, query: Tensor, scratch: Scratch) -> Scorer:
    """Return the scorer of one group with scaled queries [H, G, R, d]."""
    if encoding.cope is not None:
        return Contextual(encoding, encoding.cope, query)
    if encoding.dape is not None and encoding.dape.kernel > 1:
        return Convolved(encoding, encoding.dape, scratch)
    return Pointwise(encoding, scratch)


def reach(encoding: Encoding) -> int:
    """Return how many score columns on each side of a tile its adapted scores depend on."""
    return 0 if encoding.dape is None else 2 * (encoding.dape.kernel // 2)


@dataclass(frozen=True, slots=True)
class Cost:
    """Most numbers, in the computing dtype, that a tile takes at a time for what it is made of."""

    row: int
    key: int
    pair: int


def cost(encoding: Encoding) -> Cost:
    """Return what the rows, keys and pairs of a tile take."""
    heads, bias, dape, cope = encoding.heads, encoding.bias, encoding.dape, encoding.cope
    vector = heads * encoding.head_dim
    if cope is not None:
        return Cost(5 * vector + heads * cope.table.shape[1], vector, 9 * heads)
    hidden = 0 if dape is None else len(dape.hidden_bias)
    pair = heads + hidden
    if reach(encoding):
        pair += heads if bias is None else 2 * heads
    if isinstance(bias, Fire) or encoding.segmented:
        pair += 4 * heads + hidden
    if isinstance(bias, Fire):
        pair += 2 * len(bias.hidden_bias)
    if encoding.segmented:
        pair += 4  # differences, as integers of 64 bits
    # A function of the distance is a strip as long as rows and keys together, copied a few times.
    strip = 2 * hidden + 5 * heads + 8
    return Cost(5 * vector + strip, vector + strip, pair)


def _lowest(dtype: torch.dtype) -> float:
    """Return the score of masked pairs: finite, so that a row without any key stays free of NaN."""
    return torch.finfo(dtype).min


def _static_bias(encoding: Encoding, tile: Tile) -> Tensor:
    """Return the static bias of a tile, to broadcast to [H, G, R, width]."""
    if encoding.segmented:
        return encoding.static_bias(*tile.segments())
    if encoding.bias is None or encoding.bias.distance_only:
        distance = tile.distances()
        return tile.spread(encoding.static_bias(distance, torch.zeros_like(distance)))
    return encoding.static_bias(*tile.positions())


class Pointwise:
    """score = [A] + residual + W2 leaky(W1_A A + hidden), the static parts looked up or computed."""

    def __init__(self, encoding: Encoding, scratch: Scratch):
        self.channels = encoding.heads
        self._encoding = encoding
        self._scratch = scratch

    def __call__(self, tile: Tile, scores: Tensor) -> Tensor:
        hidden, residual = self._static_parts(tile)
        dape = self._encoding.dape
        if dape is not None and hidden is not None:
            first, second = (w[..., 0].to(scores.dtype) for w in (dape.score_weight, dape.out_weight))
            activated = self._scratch.take("hidden", len(hidden), *scores.shape[1:]).copy_(hidden).flatten(1)
            functional.leaky_relu_(activated.addmm_(first, scores.flatten(1)), LEAKY_SLOPE)
            scores.flatten(1).addmm_(second, activated, beta=int(dape.keeps_scores))
        scores += residual
        tile.hide_past_(scores, _lowest(scores.dtype))
        return scores

    def _static_parts(self, tile: Tile) -> tuple[Tensor | None, Tensor]:
        """Return what is added to the hidden values and to the scores, where it also masks the future."""
        tables, dtype = self._encoding.tables, self._scratch.dtype
        if tables is not None:
            hidden = None if tables.hidden is None else tile.look_up(tables.hidden, dtype, 0.0)
            return hidden, tile.look_up(tables.residual, dtype, _lowest(dtype))
        hidden, residual = self._encoding.split(_static_bias(self._encoding, tile))
        residual = residual.to(dtype)
        tile.hide_future_(residual, _lowest(dtype))
        return hidden, residual


class Convolved:
    """Two convolutions along keys, each as k products with shifted views of the flattened tile.

    A shift runs past the end of a row only in columns that are dropped afterwards: the hidden value of
    column c + r and the result of column c + 2r (r = k // 2) are stored at column c.
    """

    def __init__(self, encoding: Encoding, dape: Dape, scratch: Scratch):
        self.channels = encoding.heads if encoding.bias is None else 2 * encoding.heads
        self._encoding = encoding
        self._dape = dape
        self._scratch = scratch
        self._first_weight = torch.cat([dape.score_weight, dape.bias_weight], 1)[:, : self.channels]

    def __call__(self, tile: Tile, scores: Tensor) -> Tensor:
        dape, heads = self._dape, self._encoding.heads
        if self.channels > heads:
            scores[heads:] = _static_bias(self._encoding, tile)
        tile.hide_future_(scores, 0.0)
        tile.hide_past_(scores, 0.0)
        hidden = self._convolve("hidden", scores, self._first_weight, dape.hidden_bias)
        self._clear_outside(tile, functional.leaky_relu_(hidden, LEAKY_SLOPE))
        adapted = self._convolve("adapted", hidden, dape.out_weight, dape.out_bias)[..., : tile.keys]
        own = scores[..., tile.reach : tile.reach + tile.keys]
        if dape.keeps_scores:
            adapted += own[:heads]
        if dape.keeps_bias and self.channels > heads:
            adapted += own[heads:]
        tile.centre.hide_future_(adapted, _lowest(adapted.dtype))
        tile.centre.hide_past_(adapted, _lowest(adapted.dtype))
        return adapted

    def _convolve(self, name: str, channels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result = self._scratch.take(name, len(bias), *channels.shape[1:])
        taps = weight.to(result.dtype).unbind(-1)
        size = channels[0].numel() - len(taps) + 1
        target = result.flatten(1)[:, :size].copy_(bias[:, None])
        for shift, tap in enumerate(taps):
            target.addmm_(tap, channels.flatten(1)[:, shift : shift + size])
        return result

    def _clear_outside(self, tile: Tile, hidden: Tensor) -> None:
        """Zero the hidden columns left of position 0 and, by the official rule, right of the last key."""
        position = tile.positions()[1] + self._dape.kernel // 2
        outside = position < 0
        if self._dape.right_edge == "official":
            outside |= position >= tile.group.contexts[:, None, None]
        hidden.masked_fill_(outside, 0.0)


class Contextual:
    """CoPE: the sum of gates from a key to the query picks the bias; it is carried from tile to tile."""

    def __init__(self, encoding: Encoding, cope: Cope, query: Tensor):
        self.channels = encoding.heads
        self._logits = (query @ cope.table.to(query.dtype)).div_(encoding.scale)  # [H, G, R, positions]
        self._carry = query.new_zeros(query.shape[:3])

    def __call__(self, tile: Tile, scores: Tensor) -> Tensor:
        last = self._logits.shape[-1] - 1
        gates = scores.sigmoid()
        tile.hide_future_(gates, 0.0)
        position = gates.flip(-1).cumsum_(-1).flip(-1).add_(self._carry[..., None]).clamp_max_(last)
        self._carry.copy_(position[..., 0])
        lower = position.long()
        share = torch.sub(position, lower, out=gates)
        scores.addcmul_(self._logits.gather(-1, lower), 1 - share)
        scores.addcmul_(self._logits.gather(-1, lower.add_(1).clamp_max_(last)), share)
        tile.hide_future_(scores, _lowest(scores.dtype))
        tile.hide_past_(scores, _lowest(scores.dtype))
        return scores
