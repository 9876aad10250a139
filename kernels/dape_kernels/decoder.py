"""A whole decoder in the GPT-NeoX form, for backends that can run all its layers in one call.

Letters: T rows of a ragged batch, R rows, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dape_kernels.paged import RaggedBatch
from dape_kernels.quantized import Linear


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One pre-norm block: outputs [H, 3, d] of `query_key_value`, a GELU between `up` and `down`."""

    attention_norm: nn.LayerNorm
    query_key_value: Linear
    dense: Linear
    mlp_norm: nn.LayerNorm
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderModules:
    """What lies between the embedded tokens and their logits."""

    layers: Sequence[DecoderLayer]
    norm: nn.LayerNorm
    output: Linear
    parallel_residual: bool
    gelu_tanh: bool
    """Whether GELU is its tanh approximation instead of the exact form."""
    dtype: torch.dtype
    """Of the activations. Weights may have a narrower type, whose numbers this one holds as well."""
    weights: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
    """The weights of a layer may be there within this context only; its shapes are always known."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What the logits of some rows say of one token in each, and of the likeliest."""

    own: Tensor
    """Its logit, float32 [R]."""
    peak: Tensor
    """A number that no logit of the row is far above, float32 [R]."""
    total: Tensor
    """Sum of exp(logit - peak) over the vocabulary, float32 [R]."""
    above: Tensor
    """Number of logits above the row's mark, int64 [R]."""
    best: Tensor
    """The largest logit, float32 [R]."""
    best_id: Tensor
    """Its token, the lowest of those that are equal, int64 [R]."""


class Decoder(Protocol):
    """The layers of one model over the caches it was made for."""

    def run(self, x: Tensor, batch: RaggedBatch, layers: range | None = None) -> Tensor:
        """Run layers on the rows of a batch and store their keys and values.

        Args:
            x: float32 [T, h], contiguous, embedded tokens or what the layers before have returned; may be
                overwritten.
            batch: which rows belong to which sequence.
            layers: consecutive ones; by default all.

        Returns:
            Hidden states float32 [T, h], behind the last norm if the last layer was among them.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits float32 [R, V] of hidden states [R, h]."""
        ...

    def tally(self, hidden: Tensor, targets: Tensor, marks: Tensor) -> Tally:
        """Tally the logits of hidden states [R, h] without storing them.

        Args:
            hidden: any float type.
            targets: int64 [R], a token of each row.
            marks: float32 [R], what the row's logits are compared with.
        """
        ...
