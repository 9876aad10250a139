"""Cross-entropy of the output layer without a [tokens, vocabulary] buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits alive at once: 512 x 6144 in float32 are 12 MB.
ROWS = 512


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, where the logits of each chunk are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        narrow = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, wanted, grad in zip(
            *(torch.split(tensor, ROWS) for tensor in (hidden, targets, grad_hidden)), strict=True
        ):
            logits = (rows @ narrow.t()).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted[:, None])).sum()
            gradient = logits.sub_(log_sum).exp_()
            gradient.scatter_add_(1, wanted[:, None], torch.full_like(log_sum, -1.0))
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, narrow, out=grad)
            grad_weight += gradient.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count = len(targets)
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = gradient / ctx.count
        return grad_hidden * factor.to(grad_hidden.dtype), grad_weight * factor, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits hidden @ weight^T, in chunks of rows.

    Args:
        hidden: [T, h], float32 or narrower; products run in its dtype, the softmax in float32.
        weight: [V, h].
        targets: int64 [T].
    """
    # The dtypes are chosen here: on CUDA, autocast would make others of some of them.
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss
