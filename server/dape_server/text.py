"""Prompts to token ids, off the event loop and within bounds that are checked before the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

import orjson
from anyio import CapacityLimiter, to_thread

from dape_engine.detokenizer import IncrementalDetokenizer
from dape_engine.errors import ContextLengthError, RequestError
from dape_engine.tokenizer import TextTokenizer
from dape_server.errors import shorten
from dape_server.limits import MAX_TEXT_BYTES
from dape_server.protocol.common import Prompt

T = TypeVar("T")
LONG = 1 << 16
"""Characters or tokens from which work is done one piece at a time: it takes memory and a core."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as token ids, and as text where it came as text."""

    token_ids: tuple[int, ...]
    text: str | None
    added_bos: bool = False
    """Whether the tokenizer put its beginning-of-text token before the text."""


@dataclass(slots=True)
class EncodedJson:
    """The token ids of a text, as the elements of a JSON list: its text in parts, brackets left out."""

    count: int = 0
    ids: list[bytes] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    """What the tokens are called, where that was asked for."""


class TextService:
    """The tokenizer as the routes use it."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        ids = range(tokenizer.vocab_size)
        self._longest_token = max((len(tokenizer.token_bytes(token)) for token in ids), default=1)
        self._adds_bos = tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
        self._long_work = CapacityLimiter(1)

    async def encode(
        self,
        prompts: tuple[Prompt, ...],
        field: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
    ) -> list[EncodedPrompt]:
        """Return the prompts as token ids; given ids are checked and kept.

        Args:
            prompts: texts or token ids.
            field: name of the request's field, for errors.
            add_special_tokens: whether texts get the tokenizer's own special tokens.
            max_tokens: length above which a text is refused without tokenising it, where its bytes alone
                tell that it is longer.

        Raises:
            RequestError: a token id is not in the vocabulary, or the texts are too long in all.
            ContextLengthError: a text cannot fit `max_tokens`.
        """
        self._check(prompts, field, max_tokens)
        return [await self._encode(prompt, field, add_special_tokens) for prompt in prompts]

    async def encode_json(
        self, text: str, field: str, *, add_special_tokens: bool, with_names: bool
    ) -> EncodedJson:
        """Return the token ids of a text as JSON; arguments and errors as of `encode`.

        The ids of a long text never stand in memory together: to make, copy or free millions of Python's
        integers in one go holds up every other thread.
        """
        self._check((text,), field, None)
        work = partial(self._encode_json, text, field, add_special_tokens, with_names)
        return await self._in_thread(work, len(text))

    def _check(self, prompts: tuple[Prompt, ...], field: str, max_tokens: int | None) -> None:
        """Refuse ids and texts as `encode` does."""
        budget = MAX_TEXT_BYTES
        for index, prompt in enumerate(prompts):
            place = f"[{index}]" if len(prompts) > 1 else ""
            if isinstance(prompt, str):
                budget -= self._check_text(prompt, field, place, max_tokens)
            else:
                self.check_ids(prompt, field, place)
        if budget < 0:
            total = MAX_TEXT_BYTES - budget
            raise RequestError(
                f"{field}: {total} bytes of text are above the limit of {MAX_TEXT_BYTES}", param=field
            )

    def check_ids(self, token_ids: Sequence[int], field: str, place: str = "") -> None:
        """Refuse ids outside the model's vocabulary.

        Raises:
            RequestError: names the first of them.
        """
        # As in `protocol.common`, without a loop in Python.
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return
        index, token = next(
            (index, token) for index, token in enumerate(token_ids) if not 0 <= token < self.vocab_size
        )
        raise RequestError(
            f"{field}{place}[{index}]: token id must be from 0 to {self.vocab_size - 1}, "
            f"got {shorten(str(token))}",
            param=field,
        )

    def word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of each word as it begins a text and as it stands behind a space."""
        forms = (prefix + word.strip(" ") for word in words for prefix in ("", " "))
        encoded = (tuple(self.tokenizer.encode(form, add_special_tokens=False)) for form in forms)
        return tuple(dict.fromkeys(ids for ids in encoded if ids))

    async def decode(self, token_ids: list[int]) -> str:
        """Return the text of checked token ids, special tokens included."""
        decode = partial(self.tokenizer.decode, token_ids, skip_special_tokens=False)
        return await self._in_thread(decode, len(token_ids))

    async def offsets(self, token_ids: tuple[int, ...], text: str) -> list[int]:
        """Return where each token of a prompt begins in its text, in characters.

        Tokens that the tokenizer put before the text begin at 0.
        """
        return await self._in_thread(partial(self._offsets, token_ids, text), len(token_ids))

    def _offsets(self, token_ids: tuple[int, ...], text: str) -> list[int]:
        detokenizer = IncrementalDetokenizer(self.tokenizer, skip_special_tokens=False)
        begins, length = [], 0
        for token in token_ids:
            begins.append(length)
            length += len(detokenizer.push(token))
        shift = length + len(detokenizer.finish()) - len(text)
        return [min(max(begin - shift, 0), len(text)) for begin in begins]

    def _check_text(self, text: str, field: str, place: str, max_tokens: int | None) -> int:
        size = len(text.encode())
        if max_tokens is not None and size > max_tokens * self._longest_token:
            raise ContextLengthError(
                f"{field}{place}: {size} bytes of text are more than {max_tokens} tokens, the limit, "
                f"can hold ({self._longest_token} bytes each at most)",
                param=field,
            )
        return size

    async def _encode(self, prompt: Prompt, field: str, add_special_tokens: bool) -> EncodedPrompt:
        if not isinstance(prompt, str):
            return EncodedPrompt(prompt, None)
        adds_bos, ids = await self._in_thread(
            partial(self._ids, prompt, field, add_special_tokens), len(prompt)
        )
        return EncodedPrompt(ids, prompt, adds_bos)

    def _ids(self, text: str, field: str, add_special_tokens: bool) -> tuple[bool, tuple[int, ...]]:
        adds_bos, pieces = self._pieces(text, field, add_special_tokens)
        return adds_bos, tuple(chain.from_iterable(pieces))

    def _encode_json(self, text: str, field: str, add_special_tokens: bool, with_names: bool) -> EncodedJson:
        encoded = EncodedJson()
        for ids in self._pieces(text, field, add_special_tokens)[1]:
            encoded.count += len(ids)
            _extend(encoded.ids, ids)
            if with_names:
                _extend(encoded.names, [self.tokenizer.token_text(token) for token in ids])
        return encoded

    def _pieces(self, text: str, field: str, add_special_tokens: bool) -> tuple[bool, Iterator[list[int]]]:
        """Return whether BOS is put before the text, and the text's ids."""
        pieces = self.tokenizer.encode_pieces(text, add_special_tokens=add_special_tokens, param=field)
        ids = next(pieces)
        adds_bos = add_special_tokens and self._adds_bos
        if adds_bos and ids[1:2] == [self.tokenizer.bos_token_id]:
            # The text spells the token itself.
            ids, adds_bos = ids[1:], False
        return adds_bos, chain([ids], pieces)

    async def _in_thread(self, work: Callable[[], T], size: int) -> T:
        return await to_thread.run_sync(work, limiter=self._long_work if size > LONG else None)


def _extend(parts: list[bytes], values: list[int] | list[str]) -> None:
    """Add elements to a JSON list's."""
    if values:
        parts.append((b"," if parts else b"") + orjson.dumps(values)[1:-1])
