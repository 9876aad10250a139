"""Differentiable attention over whole sequences, for training, in memory linear in their length."""

from dape_kernels.dense.attention import dense_attention

__all__ = ["dense_attention"]
