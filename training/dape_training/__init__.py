"""Training and evaluation of DAPE models, by the engine's own model code."""
