"""Foreign checkpoints in, Hugging Face folders out. Offline work: the server never imports this package."""
