"""The network of DAPE version 1 over blocks of pairs in C++, forward and backward: `Network` on a CPU.

PyTorch writes and reads the hidden values of all pairs several times; here those of 128 pairs stay in the
first-level cache, in float32, and backward computes them again. Letters as of `adapt`.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from dape_kernels.cpu import library
from dape_kernels.cpu.library import STORAGE, AdapterGradientsStruct, AdapterStruct
from dape_kernels.encoding import Dape

# As kAdapterPairs of the library.
TILE = 128
# Pieces of backward for each thread: they differ in how long they take.
PARTS = 4


def available(dape: Dape, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a layer's network can run here."""
    if dape.kernel > 1 or device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        library.load()
    except library.LibraryMissingError:
        return False
    return True


class CompiledNetwork:
    """[A] + W2 leaky(W1_A A + hidden) for pairs one by one; an `Adapter`."""

    kept = 2

    def __init__(self, dape: Dape, weights: tuple[Tensor, ...]):
        self._first, self._second = (weight[..., 0].float().contiguous() for weight in weights)
        self._keeps_scores = dape.keeps_scores
        self.gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]

    def forward(
        self,
        scores: Tensor,
        query: Tensor,  # noqa: ARG002
        hidden: Tensor | None,
        future: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert hidden is not None
        scores, hidden = scores.contiguous(), hidden.to(scores.dtype).contiguous()
        adapted = torch.empty_like(scores)
        _check(library.load().dape_adapt(byref(self._struct(scores, hidden)), adapted.data_ptr()))
        return adapted, (scores, hidden)

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,  # noqa: ARG002
        kept: tuple[Tensor, ...],
        future: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scores, hidden = kept
        gradient = gradient.contiguous()
        struct = self._struct(scores, hidden)
        parts = 1 if struct.threads == 1 else min(PARTS * struct.threads, -(-struct.pairs // TILE))
        of_scores = torch.empty_like(scores)
        of_hidden = torch.empty_like(hidden, dtype=torch.float32)
        of_first, of_second = (self._first.new_empty(parts, *w.shape) for w in (self._first, self._second))
        found = AdapterGradientsStruct(
            *(x.data_ptr() for x in (gradient, of_scores, of_hidden, of_first, of_second)), parts
        )
        _check(library.load().dape_adapt_backward(byref(struct), byref(found)))
        for total, part in zip(self.gradients, (of_first, of_second), strict=True):
            total[..., 0] += part.sum(0)
        return of_scores, of_hidden, None

    def _struct(self, scores: Tensor, hidden: Tensor) -> AdapterStruct:
        """Return the call's arguments; the library works on these tensors in place."""
        heads, sequences = scores.shape[:2]
        if hidden.shape[1] == sequences:  # each sequence has its own: then they are as one
            sequences = 1
        return AdapterStruct(
            self._first.data_ptr(),
            self._second.data_ptr(),
            scores.data_ptr(),
            hidden.data_ptr(),
            sequences,
            scores.numel() // (heads * sequences),
            heads,
            len(hidden),
            self._keeps_scores,
            STORAGE[scores.dtype],
            torch.get_num_threads(),
        )


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for the network of training")
