"""Where a long text can be cut so that its pieces give the same token ids as the whole.

Tokenising in pieces needs memory for one piece only and several times less time. It is exact for
byte-level BPE with the pattern of GPT-2: none of the pattern's words goes on from a word character to a
space, and nothing of it looks back, so such a place always lies between two words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final

from tokenizers import Tokenizer

PIECE: Final = 1 << 16
"""Characters from which a text is cut."""
LONGEST_PIECE: Final = 4 << 20
"""Characters tokenised at once: the tokenizer takes about 130 bytes of memory for each."""
CUT: Final = re.compile(r"\w(?=[ \n])")


def can_cut(tokenizer: Tokenizer) -> bool:
    """Return whether pieces made by `pieces` give the ids of the whole text."""
    parts = json.loads(tokenizer.to_str())
    added = parts["added_tokens"]
    pattern = parts["pre_tokenizer"] or {}
    return (
        parts["model"]["type"] == "BPE"
        # NFC joins characters, but none with a space.
        and (parts["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and pattern.get("type") == "ByteLevel"
        and pattern["use_regex"]
        and not pattern["add_prefix_space"]
        # Such tokens may reach over a cut.
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
        and not any(CUT.search(token["content"]) for token in added)
    )


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of `PIECE` characters and the few more up to the next place for a cut."""
    begin = 0
    while cut := CUT.search(text, begin + PIECE):
        yield text[begin : cut.end()]
        begin = cut.end()
    yield text[begin:]
