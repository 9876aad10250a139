"""Log-probabilities that are kept with a block of the prefix cache, packed small."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from dape_engine.request import TokenLogprob


class BlockScores:
    """Log-probabilities of the tokens of one block and of the likeliest alternatives at their places.

    They depend only on the tokens from the first one of the text to the block's last, as the block's key
    does. The text's very first token has none.
    """

    __slots__ = ("_ids", "_logprobs", "_ranks", "_values", "top")

    def __init__(self, scored: Sequence[TokenLogprob], top: int):
        self.top = top
        """Alternatives kept per token, all of them where the vocabulary is smaller."""
        self._logprobs = array("f", [entry.logprob for entry in scored])
        self._ranks = array("i", [entry.rank for entry in scored])
        self._ids = array("i", [token for entry in scored for token, _ in entry.top])
        self._values = array("f", [value for entry in scored for _, value in entry.top])

    def entries(self, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
        """Return the last entries, one per token given, with up to `top` alternatives each.

        Args:
            tokens: the last tokens of the block.
            top: at most `self.top`.
        """
        width = len(self._ids) // len(self._logprobs)
        first = len(self._logprobs) - len(tokens)
        result = []
        for place, token in enumerate(tokens, first):
            kept = slice(place * width, place * width + min(top, width))
            pairs = tuple(zip(self._ids[kept], self._values[kept], strict=True))
            result.append(TokenLogprob(token, self._logprobs[place], pairs, self._ranks[place]))
        return result
