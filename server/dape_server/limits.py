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
MAX_ALLOWED_TOKEN_IDS: Final = 1 << 16
MAX_LOGPROB_TOKEN_IDS: Final = 128
MAX_BAD_WORDS: Final = 64
MAX_BAD_WORD_CHARS: Final = 256
MAX_MESSAGES: Final = 1024
"""Messages of one chat."""
MAX_PARTS: Final = 256
"""Parts of one message."""
MAX_LOGPROBS: Final = 20
"""Alternatives reported per token."""
MAX_LOGPROB_ENTRIES: Final = 1 << 20
"""Log-probabilities in one answer: reported tokens times (1 + alternatives)."""

MAX_TEXT_BYTES: Final = 12 << 20
"""UTF-8 bytes of all texts of a request: the tokenizer takes about a second for 5 million."""
MAX_INPUT_TOKENS: Final = 1 << 20
"""Tokens of all inputs of a perplexity request, or of one list to be turned into text."""
MAX_WINDOWS: Final = 1 << 16
"""Windows of a perplexity request."""
MAX_READ_TOKENS: Final = 1 << 24
"""Tokens that the windows of a perplexity request read in all."""
MAX_LENGTHS: Final = 64
"""Entries of `lengths`."""

MAX_LISTED: Final = 1024
"""Layers or heads named by a request for biases."""
MAX_BIAS_VALUES: Final = 1 << 20
"""Values in one answer about biases: 3 x layers x heads x keys."""

REQUEST_ID: Final = r"[A-Za-z0-9._:-]{1,128}"
"""Form of a request's name, in the header X-Request-Id as in the body."""
MAX_USER_CHARS: Final = 256
MAX_CACHE_SALT_CHARS: Final = 1024

MAX_JSON_LISTS: Final = 1 << 16
"""Lists and objects of one body: a parser makes 2 million of them in a second, and nothing else runs."""
MAX_JSON_VALUES: Final = MAX_INPUT_TOKENS + MAX_JSON_LISTS
"""Values of one body: the tokens of an input, and the rest."""

MAX_INT: Final = (1 << 31) - 1
"""Largest count accepted anywhere."""
MAX_SECONDS: Final = 86_400
"""Longest time limit, of a request as of the server's settings."""
RETRY_SECONDS: Final = 5
"""`Retry-After` of a server that is starting or stopping."""

MAX_HEADERS: Final = 100
"""Headers of one request."""
MAX_HEADER_BYTES: Final = 16 << 10
"""Bytes of a request's line and headers."""
MAX_DISCARDED_BYTES: Final = 64 << 20
"""Bytes of a refused body that are read nevertheless: a client that is still sending sees no answer."""
LEAST_SENT_BYTES: Final = 64 << 10
"""What a client must take of its answer in each `send_timeout`, unless less is waiting."""
