"""Training attention as Triton kernels, for what depends on the distance only."""
