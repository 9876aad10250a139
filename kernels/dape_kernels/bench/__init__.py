"""Measures the attention kernels beside alternatives and beside what the machine itself can do."""
