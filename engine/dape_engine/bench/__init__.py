"""Measures the whole engine: prefill, decoding and memory, alone or beside another engine."""
