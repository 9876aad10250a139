"""Attention with data-adaptive positional encoding over a paged KV cache."""
