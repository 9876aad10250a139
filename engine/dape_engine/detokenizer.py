"""Generated tokens to text that is safe to send: complete characters, up to the first stop.

Every step costs time in the size of the new text only, whatever was generated before.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Literal

from dape_engine.request import SamplingParams
from dape_engine.tokenizer import TextTokenizer


class IncrementalDetokenizer:
    """Tokens in, complete characters out.

    A character split over tokens is held back until it is complete; bytes that are not UTF-8 become U+FFFD.
    All the text together equals the decoding of all the tokens together.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return U+FFFD for an incomplete character at the end, or nothing."""
        return self._decoder.decode(b"", final=True)


class StopChecker:
    """Cuts a text at the first stop string, which may span any number of pieces.

    The stop string that is complete first counts, the longer of two that end together: how the text was cut
    into pieces makes no difference. Once `matched` is set, all further text is dropped.
    """

    def __init__(self, stop: tuple[str, ...], *, include_stop_str_in_output: bool = False):
        self._stop = stop
        self._include = include_stop_str_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that can be sent: all but an end that may turn into a stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        sent = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[sent:]
        return text[:sent]

    def flush(self) -> str:
        """Return the text held back, when no more will come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a beginning, but not all, of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What one token adds to the text."""

    text: str
    offset: int
    """Where the token's own text begins, in characters of all the text so far, sent or held back."""
    finish_reason: Literal["stop"] | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the text; None for the end-of-text token."""


class OutputText:
    """The text of one completion, from its tokens and its stop conditions.

    As in vLLM, the text of the first `min_tokens` tokens is not searched for stop strings, and a token that
    ends the text adds nothing to it unless `include_stop_str_in_output`.
    """

    def __init__(self, tokenizer: TextTokenizer, params: SamplingParams):
        self._params = params
        self._eos_token_id = None if params.ignore_eos else tokenizer.eos_token_id
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._checker = StopChecker(params.stop, include_stop_str_in_output=params.include_stop_str_in_output)
        self._num_tokens = 0
        self._num_characters = 0

    def push(self, token_id: int) -> TextPiece:
        """Add a generated token; the piece says whether it ends the text, after which none may follow."""
        self._num_tokens += 1
        offset = self._num_characters
        is_eos = token_id == self._eos_token_id
        ends = self._may_stop and (is_eos or token_id in self._params.stop_token_ids)
        hidden = ends and not self._params.include_stop_str_in_output
        text = "" if hidden else self._checked(self._detokenizer.push(token_id))
        if ends:
            text += self.flush()
        if self._checker.matched is not None:
            return TextPiece(text, offset, "stop", self._checker.matched)
        if ends:
            return TextPiece(text, offset, "stop", None if is_eos else token_id)
        return TextPiece(text, offset)

    def flush(self) -> str:
        """Return the text held back, where the text ends for another reason than a stop."""
        return self._checked(self._detokenizer.finish()) + self._checker.flush()

    @property
    def _may_stop(self) -> bool:
        return self._num_tokens > self._params.min_tokens

    def _checked(self, text: str) -> str:
        self._num_characters += len(text)
        return self._checker.push(text) if self._may_stop else text
