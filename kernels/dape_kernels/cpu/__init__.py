"""Attention in C++ for CPUs: AVX-512, AVX2 and portable code in one library, chosen by the processor."""

from dape_kernels.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
