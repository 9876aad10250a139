"""The attention of whole sequences as one differentiable function, block by block in both directions.

On CUDA devices most layers go to `dape_kernels.triton.dense` instead; `dense_attention` chooses.

Nothing of the size of all pairs is stored: backward computes the blocks again, but for the first ones whose
intermediate values fit into KEPT_BYTES. Letters: H heads, B sequences, N tokens, d head size, b sequences,
R rows and K keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dape_kernels.dense.adapt import Adapter, Kept, adapter_tensors, make_adapter
from dape_kernels.dense.blocks import CPU_BLOCK, OTHER_BLOCK, Block
from dape_kernels.dense.static import Static, static_parts
from dape_kernels.encoding import Encoding
from dape_kernels.triton.dense.attention import fused_attention, unsupported

# Bytes that one call keeps for its backward pass beside q, k, v and the output. To compute a block again
# costs about a third of its time; of short sequences all is kept.
KEPT_BYTES = 64 << 20


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, segments: Tensor | None = None
) -> Tensor:
    """Causal attention of whole sequences, differentiable in q, k, v and the encoding's parameters.

    By Triton kernels on CUDA devices where they support the layer, else block by block in PyTorch.

    Args:
        query, key, value: [B, H, N, d], rotated already where the encoding is rotary.
        encoding: the layer's score function; its parameters may require gradients.
        segments: int64 [B, N], the segment of each token, where the encoding is `segmented`.

    Returns:
        [B, H, N, d] in the dtype of `query`.
    """
    # The only place that chooses.
    if query.device.type == "cuda" and unsupported(encoding, query) is None:
        return fused_attention(query, key, value, encoding)
    return blockwise_attention(query, key, value, encoding, segments)


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, segments: Tensor | None = None
) -> Tensor:
    """`dense_attention` of any layer on any device.

    Memory beside inputs, output and their gradients is bounded by KEPT_BYTES and a few blocks.
    """
    with torch.autocast(query.device.type, enabled=False):
        static = static_parts(encoding, query.shape[2], segments, query.device)
        tensors = adapter_tensors(encoding)
        output: Tensor = _DenseAttention.apply(  # type: ignore[no-untyped-call]
            _Layer(encoding, static, len(tensors)),
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            *tensors,
            *static.tensors,
        )
    return output.transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the function's two directions have in common, but for the values of tensors."""

    encoding: Encoding
    static: Static
    num_adapter_tensors: int

    def groups(self, query: Tensor) -> Iterator[list[Block]]:
        """Yield the blocks that share their static parts."""
        _, sequences, tokens, _ = query.shape
        dape = self.encoding.dape
        margin = 0 if dape is None else 4 * (dape.kernel // 2)
        size = CPU_BLOCK if query.device.type == "cpu" else OTHER_BLOCK
        for blocks in size.groups(sequences, tokens, margin):
            yield from ([block] for block in blocks) if self.static.per_sequence else [blocks]

    def weigh(
        self,
        adapter: Adapter,
        query: Tensor,
        key: Tensor,
        residual: Tensor,
        hidden: Tensor | None,
        future: Tensor,
    ) -> tuple[Tensor, Kept]:
        """Return the attention weights [H * b, R, K] of a block, and what the adapter's backward wants.

        Args:
            adapter: of the layer.
            query, key: [H, b, R, d] and [H, b, K, d].
            residual: minus infinity above the diagonal.
            hidden: see `Static`.
            future: which pairs lie above the diagonal.
        """
        scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).mul_(self.encoding.scale)
        scores = scores.unflatten(0, query.shape[:2])
        adapted, kept = adapter.forward(scores, query, hidden, future)
        return adapted.add_(residual).softmax(-1).flatten(0, 1), kept


class _DenseAttention(torch.autograd.Function):
    """softmax(adapt(q k / sqrt(d)) + residual) v."""

    @staticmethod
    def forward(
        ctx: Any, layer: _Layer, query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor
    ) -> Tensor:
        dtype, count = query.dtype, layer.num_adapter_tensors
        adapter = make_adapter(layer.encoding, tensors[:count], dtype, query.shape[2])
        output = torch.empty(query.shape, dtype=dtype, device=query.device)
        saved: list[Tensor | None] = []
        room = KEPT_BYTES
        for group in layer.groups(query):
            future = group[0].future(query.device)
            residual, hidden = _parts(layer.static, tensors[count:], group[0], future, dtype)
            for block in group:
                q, k, v = query[:, block.sequences, block.rows], *_keys(block, key, value)
                weights, kept = layer.weigh(adapter, q, k, residual, hidden, future)
                output[:, block.sequences, block.rows] = torch.bmm(weights, v.flatten(0, 1)).view(q.shape)
                room -= sum(tensor.nbytes for tensor in (weights, *kept))
                saved += (weights, *kept) if room >= 0 else (None,) * (1 + adapter.kept)
        ctx.save_for_backward(query, key, value, output, *tensors, *saved)
        ctx.layer, ctx.num_tensors = layer, len(tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradient.device.type, enabled=False):
            return None, *_backward(ctx, gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    layer: _Layer = ctx.layer
    query, key, value, output, *rest = ctx.saved_tensors
    tensors, saved = tuple(rest[: ctx.num_tensors]), iter(rest[ctx.num_tensors :])
    dtype, count = query.dtype, layer.num_adapter_tensors
    wide = torch.promote_types(dtype, torch.float32)
    static, static_tensors = layer.static, tensors[count:]
    static_learns = any(ctx.needs_input_grad[4 + count :])
    adapter = make_adapter(layer.encoding, tensors[:count], dtype, query.shape[2])
    delta = (gradient.to(wide) * output.to(wide)).sum(-1, keepdim=True).to(dtype)
    grad_query = torch.empty(query.shape, dtype=dtype, device=query.device)
    grad_key, grad_value = (torch.empty(x.shape, dtype=wide, device=x.device) for x in (key, value))
    grad_static = [torch.zeros_like(tensor) for tensor in static_tensors]
    for group in layer.groups(query):
        future = group[0].future(query.device)
        parts: tuple[Tensor, Tensor | None] | None = None
        of_parts: list[Tensor] = []
        for block in group:
            q, k, v = query[:, block.sequences, block.rows], *_keys(block, key, value)
            weights, kept = next(saved), tuple(next(saved) for _ in range(adapter.kept))
            if weights is None:
                parts = parts or _parts(static, static_tensors, group[0], future, dtype)
                weights, kept = layer.weigh(adapter, q, k, *parts, future)
            grad_out = gradient[:, block.sequences, block.rows].flatten(0, 1)
            _add_keys(grad_value, block, torch.bmm(weights.transpose(1, 2), grad_out))
            of_adapted = torch.bmm(grad_out, v.flatten(0, 1).transpose(1, 2))
            of_adapted.sub_(delta[:, block.sequences, block.rows].flatten(0, 1)).mul_(weights)
            of_adapted = of_adapted.unflatten(0, q.shape[:2])
            of_scores, of_hidden, of_query = adapter.backward(of_adapted, q, kept, future)
            if static_learns:
                _add_parts(of_parts, (of_adapted, of_hidden), static.per_sequence, wide)
            of_scores = of_scores.flatten(0, 1)
            along = torch.bmm(of_scores, k.flatten(0, 1)).mul_(layer.encoding.scale).view(q.shape)
            grad_query[:, block.sequences, block.rows] = along if of_query is None else along + of_query
            _add_keys(grad_key, block, torch.bmm(of_scores.transpose(1, 2), q.flatten(0, 1)))
        if static_learns:
            for total, part in zip(
                grad_static, static.gradients(static_tensors, group[0], of_parts), strict=True
            ):
                if part is not None:
                    total += part
    grad_key *= layer.encoding.scale
    return grad_query, grad_key.to(dtype), grad_value.to(dtype), *adapter.gradients, *grad_static


def _keys(block: Block, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the views [H, b, K, d] of tensors [H, B, N, d] with the keys of a block."""
    return tuple(tensor[:, block.sequences, block.keys] for tensor in tensors)


def _add_keys(total: Tensor, block: Block, part: Tensor) -> None:
    """Add a block's gradients [H * b, K, d] to `total` [H, B, N, d]; the last rows come first and fill it."""
    view = total[:, block.sequences, block.keys]
    part = part.view(view.shape)
    if block.rows.stop == total.shape[2]:
        view.copy_(part)
    else:
        view += part


def _parts(
    static: Static, tensors: tuple[Tensor, ...], block: Block, future: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the residual, with minus infinity above the diagonal, and the hidden part, in `dtype`."""
    residual, *hidden = (part.to(dtype) for part in static.parts(tensors, block))
    return residual.masked_fill(future, float("-inf")), hidden[0] if hidden else None


def _add_parts(
    totals: list[Tensor], parts: tuple[Tensor, Tensor | None], per_sequence: bool, dtype: torch.dtype
) -> None:
    """Add the gradients of one block's parts to those of its group, which are empty at first."""
    found = [
        part if per_sequence or part.shape[1] == 1 else part.sum(1, keepdim=True)
        for part in parts
        if part is not None
    ]
    if totals:
        for total, part in zip(totals, found, strict=True):
            total += part
    else:
        totals += [part.to(dtype) for part in found]
