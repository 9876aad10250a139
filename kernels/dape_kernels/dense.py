"""Differentiable attention over whole short sequences, for training.

The score network works on blocks of queries small enough to stay in the processor's cache and skips
the keys that no query of the block can see. Letters: H heads, B sequences, N tokens, d head size,
D hidden width of DAPE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dape_kernels.bias import LEAKY_SLOPE
from dape_kernels.encoding import Encoding
from dape_kernels.reference import reference_attention

# Pairs of query and key per block: with 8 heads and D = 32 they take 2 MB in bfloat16. oneDNN 3.12's bfloat16
# product over the pairs divides by zero for some larger counts (57344 on processors with AMX).
BLOCK_PAIRS = 2**15
BLOCK_QUERIES = 32


def dense_attention(query: Tensor, key: Tensor, value: Tensor, encoding: Encoding) -> Tensor:
    """Causal attention of whole sequences, differentiable in q, k, v and the encoding's parameters.

    Args:
        query, key, value: [B, H, N, d], rotated already where the encoding is rotary.
        encoding: the layer's score function; its parameters may require gradients.

    Returns:
        [B, H, N, d] in the dtype of `query`.
    """
    if encoding.cope is not None or (encoding.dape is not None and encoding.dape.kernel > 1):
        return reference_attention(query, key, value, encoding)
    with torch.autocast(query.device.type, enabled=False):
        hidden, residual = _static_parts(encoding, torch.arange(query.shape[2], device=query.device))
    dape = encoding.dape
    output: Tensor = _DenseAttention.apply(  # type: ignore[no-untyped-call]
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        residual,
        hidden,
        None if dape is None else dape.score_weight[..., 0],
        None if dape is None else dape.out_weight[..., 0],
        encoding.scale,
        dape is None or dape.keeps_scores,
    )
    return output.transpose(0, 1)


def _static_parts(encoding: Encoding, position: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return `Encoding.split` of every pair of positions: [D, N, N] (None without DAPE) and [H, N, N]."""
    if not encoding.tabular:
        return encoding.split(encoding.static_bias(position[:, None], position))
    hidden, residual = encoding.split(encoding.static_bias(position, torch.zeros_like(position)))
    distance = (position[:, None] - position).clamp_min(0)
    return None if hidden is None else hidden[:, distance], residual[:, distance]


def attention_blocks(sequences: int, tokens: int) -> list[tuple[slice, slice, slice]]:
    """Slices of sequences, query rows and the keys those rows can see, at most BLOCK_PAIRS pairs each."""
    queries = max(1, min(BLOCK_QUERIES, BLOCK_PAIRS // tokens))
    together = max(1, BLOCK_PAIRS // (queries * tokens))
    return [
        (slice(b, min(b + together, sequences)), slice(i, end), slice(0, end))
        for b in range(0, sequences, together)
        for i in range(0, tokens, queries)
        for end in (min(i + queries, tokens),)
    ]


def _batched(tensor: Tensor, sequences: slice, rows: slice) -> Tensor:
    """Return the block [H * b, rows, d] of a tensor [H, B, N, d]."""
    return tensor[:, sequences, rows].flatten(0, 1)


class _DenseAttention(torch.autograd.Function):
    """softmax([A] + residual + W2 leaky(W1 A + hidden)) V with hidden and residual of all pairs."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        query: Tensor,  # [H, B, N, d]
        key: Tensor,
        value: Tensor,
        residual: Tensor,  # [H, N, N]
        hidden: Tensor | None,  # [D, N, N]
        score_weight: Tensor | None,  # [D, H]
        out_weight: Tensor | None,  # [H, D]
        scale: float,
        keeps_scores: bool,
    ) -> Tensor:
        heads, sequences, tokens, _ = query.shape
        dtype = query.dtype
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        residual = residual.masked_fill(future, float("-inf")).to(dtype)
        if hidden is not None and score_weight is not None and out_weight is not None:
            hidden, score_weight, out_weight = (t.to(dtype) for t in (hidden, score_weight, out_weight))
        output = torch.empty(query.shape, dtype=dtype, device=query.device)
        saved: list[Tensor | None] = []
        for seqs, rows, keys in attention_blocks(sequences, tokens):
            q, k, v = _batched(query, seqs, rows), _batched(key, seqs, keys), _batched(value, seqs, keys)
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale).view(heads, -1)
            activated = None
            adapted = scores
            if hidden is not None and score_weight is not None and out_weight is not None:
                shape = (len(hidden), -1, q.shape[1], k.shape[1])
                activated = (score_weight @ scores).view(shape)
                activated += hidden[:, None, rows, keys]
                activated = functional.leaky_relu_(activated, LEAKY_SLOPE).view(len(hidden), -1)
                change = out_weight @ activated
                adapted = change.add_(scores) if keeps_scores else change
            adapted = adapted.view(heads, -1, q.shape[1], k.shape[1]) + residual[:, None, rows, keys]
            weights = adapted.softmax(-1).flatten(0, 1)
            output[:, seqs, rows] = torch.bmm(weights, v).unflatten(0, (heads, -1))
            saved += [scores, activated, weights]
        ctx.save_for_backward(query, key, value, output, score_weight, out_weight, *saved)
        ctx.scale, ctx.keeps_scores = scale, keeps_scores
        return output

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, score_weight, out_weight, *saved = ctx.saved_tensors
        heads, sequences, tokens, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        delta = (gradient.to(wide) * output.to(wide)).sum(-1, keepdim=True).to(query.dtype)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        grad_residual = query.new_zeros((heads, tokens, tokens), dtype=wide)
        width = 0 if score_weight is None else len(score_weight)
        grad_hidden = query.new_zeros((width, tokens, tokens), dtype=wide)
        grad_score_weight = query.new_zeros((width, heads), dtype=wide)
        grad_out_weight = query.new_zeros((heads, width), dtype=wide)
        blocks = attention_blocks(sequences, tokens)
        for (seqs, rows, keys), scores, activated, weights in zip(
            blocks, saved[0::3], saved[1::3], saved[2::3], strict=True
        ):
            q, k, v = _batched(query, seqs, rows), _batched(key, seqs, keys), _batched(value, seqs, keys)
            grad_out = _batched(gradient, seqs, rows)
            pairs = (-1, q.shape[1], k.shape[1])
            grad_value[:, seqs, keys] += torch.bmm(weights.transpose(1, 2), grad_out).unflatten(
                0, (heads, -1)
            )
            grad_adapted = torch.bmm(grad_out, v.transpose(1, 2))
            grad_adapted = grad_adapted.sub_(_batched(delta, seqs, rows)).mul_(weights).view(heads, -1)
            grad_residual[:, rows, keys] += grad_adapted.view(heads, *pairs).sum(1)
            grad_scores = grad_adapted
            if score_weight is not None:
                grad_activated = out_weight.t() @ grad_adapted
                grad_out_weight += grad_adapted @ activated.t()
                # The sign of the activated value is that of its input, so the result serves as both.
                grad_pre = torch.ops.aten.leaky_relu_backward(grad_activated, activated, LEAKY_SLOPE, True)
                grad_score_weight += grad_pre @ scores.t()
                grad_hidden[:, rows, keys] += grad_pre.view(len(grad_pre), *pairs).sum(1)
                through = score_weight.t() @ grad_pre
                grad_scores = through.add_(grad_adapted) if ctx.keeps_scores else through
            grad_scores = grad_scores.mul(ctx.scale).view(-1, q.shape[1], k.shape[1])
            grad_query[:, seqs, rows] = torch.bmm(grad_scores, k).unflatten(0, (heads, -1))
            grad_key[:, seqs, keys] += torch.bmm(grad_scores.transpose(1, 2), q).unflatten(0, (heads, -1))
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_residual,
            *((grad_hidden, grad_score_weight, grad_out_weight) if width else (None, None, None)),
            None,
            None,
        )
