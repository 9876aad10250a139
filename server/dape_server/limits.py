"""Bounds on what one request may ask for. Whatever is above is refused with the field, limit and value."""

from __future__ import annotations

from typing import Final

MAX_PROMPTS: Final = 128
"""Prompts or inputs of one request."""
MAX_COMPLETIONS: Final = 128
"""Prompts times `n`."""
MAX_STOP: Final = 16
MAX_STOP_CHARS: Final = 1024
"""Characters of one stop string."""
MAX_STOP_TOKEN_IDS: Final = 128
MAX_LOGIT_BIAS: Final = 1024
"""Entries of `logit_bias`."""
MAX_LOGPROBS: Final = 20
"""Alternatives reported per token."""
MAX_LOGPROB_ENTRIES: Final = 1 << 20
"""Log-probabilities in one answer: reported tokens times (1 + alternatives)."""

MAX_TEXT_BYTES: Final = 4 << 20
"""UTF-8 bytes of all texts of a request: the tokenizer takes about 200 bytes of memory for each."""
MAX_INPUT_TOKENS: Final = 1 << 20
"""Tokens of all inputs of a perplexity request, or of one list to be turned into text."""
MAX_WINDOWS: Final = 1 << 16
"""Windows of a perplexity request."""
MAX_READ_TOKENS: Final = 1 << 24
"""Tokens that the windows of a perplexity request read in all."""
MAX_LENGTHS: Final = 64
"""Entries of `lengths`."""

MAX_INT: Final = (1 << 31) - 1
"""Largest count accepted anywhere."""
RETRY_SECONDS: Final = 5
"""`Retry-After` of a server that is starting or stopping."""
