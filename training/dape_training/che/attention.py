"""Attention over whole sequences for the CHE models: in both directions, or causal.

In both directions the distance of query i and key j is |i - j|: biases are asked for with the larger
position as the query. So FIRE's normaliser uses the larger of the two positions. DAPE's network acts on one
pair at a time and needs no other change.

Letters: B sequences, N tokens, H heads, d head size, D hidden width of DAPE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dape_kernels.dense import adapt_scores
from dape_kernels.encoding import Encoding

# Pairs of query and key worked on at a time: with D = 32 they take 2 MB, which stay in the processor's cache.
BLOCK_PAIRS = 2**14


def whole_attention(
    query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, positions: Tensor, *, causal: bool
) -> Tensor:
    """Return attention of whole sequences, differentiable in everything but the positions.

    Without gradients the memory for pairs is that of one block, whatever the length.

    Args:
        query, key, value: [B, N, H, d], rotated already where the encoding is rotary.
        encoding: the layer's score function, pointwise (no kernel along keys, no CoPE).
        positions: int64 [N], ascending.
        causal: whether a query sees only keys up to its own place.

    Returns:
        [B, N, H, d].
    """
    tokens = query.shape[1]
    query, key, value = (tensor.permute(2, 0, 1, 3) for tensor in (query, key, value))
    rows = max(1, min(tokens, BLOCK_PAIRS // tokens))
    sequences = max(1, BLOCK_PAIRS // (rows * tokens))
    # Split rather than sliced: the gradient of each slice would be as large as the whole.
    keys, values = key.split(sequences, 1), value.split(sequences, 1)
    outputs = []
    end = 0
    for row_queries, row_positions in zip(query.split(rows, 2), positions.split(rows), strict=True):
        end += len(row_positions)
        seen = end if causal else tokens
        at_query, at_key = row_positions[:, None], positions[:seen]
        bias = encoding.static_bias(torch.maximum(at_query, at_key), torch.minimum(at_query, at_key))
        hidden, residual = encoding.split(bias)
        if causal:
            residual = residual.masked_fill(at_key > at_query, float("-inf"))
        blocks = [
            _attend_block(q, k[:, :, :seen], v[:, :, :seen], encoding, hidden, residual)
            for q, k, v in zip(row_queries.split(sequences, 1), keys, values, strict=True)
        ]
        outputs.append(torch.cat(blocks, 1))
    return torch.cat(outputs, 2).permute(1, 2, 0, 3)


def _attend_block(
    query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, hidden: Tensor | None, residual: Tensor
) -> Tensor:
    """softmax([A] + residual + W2 leaky(W1 A + hidden)) V of queries [H, b, r, d] and keys [H, b, n, d]."""
    heads, count, rows, _ = query.shape
    scores = query.flatten(0, 1) * encoding.scale @ key.flatten(0, 1).transpose(1, 2)
    adapted = scores = scores.view(heads, count, rows, -1)
    if encoding.dape is not None and hidden is not None:
        adapted = adapt_scores(encoding.dape, scores, hidden[:, None])
    weights = (adapted + residual[:, None]).softmax(-1)
    output = torch.bmm(weights.flatten(0, 1), value.flatten(0, 1))
    return output.view(heads, count, rows, -1)
