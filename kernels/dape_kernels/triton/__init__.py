"""Fused attention in Triton for CUDA devices; run by Triton's interpreter in tests where there is none."""

from dape_kernels.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
