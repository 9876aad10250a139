"""Attention in plain PyTorch on any device: tiles of queries and keys with all heads, online softmax."""

from dape_kernels.chunked.backend import ChunkedBackend

__all__ = ["ChunkedBackend"]
