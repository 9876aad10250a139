"""Differentiable attention over whole sequences, for training, in memory linear in their length."""

from dape_kernels.dense.adapt import adapt_scores
from dape_kernels.dense.attention import blockwise_attention, dense_attention

__all__ = ["adapt_scores", "blockwise_attention", "dense_attention"]
