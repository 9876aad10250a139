"""What a completion must match, token by token: JSON schemas, regular expressions, choices, grammars.

The matching is llguidance's, over this project's own table of token bytes. Grammars come from clients, so
every size is bounded: what would take the library too much stack, time or memory is refused before or while
it is compiled, and a text whose grammar outgrows its limits later ends with an error of its own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from dape_engine.errors import RequestError
from dape_engine.json_schema import in_known_words
from dape_engine.tokenizer import TextTokenizer

Kind: TypeAlias = Literal["json", "regex", "choice", "grammar"]

MAX_SCHEMA_BYTES: Final = 64 << 10
MAX_REGEX_CHARS: Final = 4096
MAX_CHOICES: Final = 1024
MAX_GRAMMAR_BYTES: Final = 16 << 10
"""Of a grammar or of all choices together."""
MAX_NESTING: Final = 400
"""Bound on how deep rules, brackets, schemas and references can lead into each other: the library follows
them by recursion, and something above a thousand levels would end the process."""

LIMITS: Final = LLParserLimits(
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=10_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
"""Some milliseconds a token and some megabytes a text at most."""
SHOWN_CHARS: Final = 160


class Constraint:
    """The state of one completion inside a grammar.

    Args:
        matcher: the library's, not shared.
        text: the grammar in the library's form, from which another process makes the same one.
        field: of the request, for errors.
    """

    def __init__(self, matcher: LLMatcher, text: str, field: str):
        self._matcher = matcher
        self.text = text
        self.field = field

    def restrict(self, logits: Tensor) -> None:
        """Set the logits float32 [V] of tokens that may not come next to minus infinity, in place.

        Nothing is changed where the grammar has outgrown its limits; see `error`.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(np.bool_)
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), -torch.inf)

    def append(self, token: int) -> None:
        """Go on behind a drawn token."""
        if not self._matcher.is_error():
            self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the text may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> RequestError | None:
        """Why the text cannot go on, if it cannot: the grammar has outgrown its limits."""
        return _refusal(self.field, self._matcher.get_error()) if self._matcher.is_error() else None


class Grammar:
    """A compiled grammar, of which every completion gets a state of its own."""

    def __init__(self, matcher: LLMatcher, text: str, field: str):
        self._matcher = matcher
        self._text = text
        self._field = field

    def constraint(self) -> Constraint:
        """Return the state of a text that has not begun."""
        return Constraint(self._matcher.deep_copy(), self._text, self._field)


class GrammarCompiler:
    """Compiles grammars for one tokenizer; any thread may call it.

    Args:
        tokenizer: gives the bytes of every token; special tokens are never drawn, but for the end.
        vocab_size: V, the width of the model's logits.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int):
        self._words = _Words(tokenizer, vocab_size)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, kind: Kind, source: Any, field: str) -> Grammar:
        """Return the grammar of a client's source. It takes milliseconds, in the worst case a second.

        Args:
            kind: "json": a JSON schema as a dictionary, without whitespace in the text unless the schema's
                `x-guidance` says otherwise; "regex": a regular expression that the whole text matches;
                "choice": a list of texts; "grammar": Lark or, where it holds `::=`, GBNF.
            source: the client's.
            field: the request's field, for errors.

        Raises:
            RequestError: the source is too large or not understood.
        """
        return self.compile_text(_source_text(kind, source, field), field)

    def compile_text(self, text: str, field: str) -> Grammar:
        """Return the grammar of a text in the library's form, such as `Constraint.text`.

        Raises:
            RequestError: the text is not understood.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(TokenizerWrapper(self._words))
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            # The first step, often the most expensive one, is taken here and not in the engine.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(field, matcher.get_error())
        return Grammar(matcher, text, field)


def _source_text(kind: Kind, source: Any, field: str) -> str:
    """Return the source in the library's form, once its size is known to be bounded."""
    if kind == "json":
        try:
            schema = json.dumps(source, allow_nan=False)
        except ValueError as error:
            raise _refusal(field, "a number is beyond the range of double precision") from error
        _bound(field, len(schema), "bytes", MAX_SCHEMA_BYTES)
        _bound(field, _nesting(source), "levels of nesting and references", MAX_NESTING)
        return LLMatcher.grammar_from_json_schema(
            json.dumps(in_known_words(source)),
            defaults={"whitespace_flexible": False},
            overrides={"lenient": False},
        )
    if kind == "regex":
        _bound(field, len(source), "characters", MAX_REGEX_CHARS)
        return LLMatcher.grammar_from_regex(source)
    if kind == "choice":
        _bound(field, len(source), "choices", MAX_CHOICES)
        grammar = "start: " + " | ".join(map(json.dumps, source))
        _bound(field, len(grammar), "bytes", MAX_GRAMMAR_BYTES)
        return LLMatcher.grammar_from_lark(grammar)
    _bound(field, len(source.encode()), "bytes", MAX_GRAMMAR_BYTES)
    levels = source.replace("::=", ":").count(":") + source.count("(")
    _bound(field, levels, "rules and brackets (colons and opening parentheses)", MAX_NESTING)
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(source))
    except Exception as error:  # the library raises nothing narrower
        raise _refusal(field, str(error)) from error


def _nesting(schema: Any) -> int:
    """Return a bound on how many parts of a schema can lead into each other.

    No more than there are lists and objects, nor than one way down per reference, and the first.
    """
    parts = references = deepest = 0
    level = [schema]
    while level := [part for part in level if isinstance(part, (dict, list))]:
        deepest += 1
        parts += len(level)
        references += sum(
            key.lower().endswith("ref") for part in level if isinstance(part, dict) for key in part
        )
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return min(parts, deepest * (references + 1))


def _bound(field: str, size: int, unit: str, limit: int) -> None:
    if size > limit:
        raise RequestError(f"{field}: {size} {unit} are above the limit of {limit}", param=field)


def _refusal(field: str, reason: str) -> RequestError:
    """Return the error of a source, with the first line of the library's reason."""
    first = reason.strip().split("\n")[0][:SHOWN_CHARS].encode("unicode_escape").decode("ascii")
    return RequestError(f"{field}: cannot be used: {first}", param=field, code="invalid_grammar")


class _Words:
    """The vocabulary in the form that llguidance asks for."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int):
        eos = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token in range(vocab_size) if tokenizer.is_special(token)]
        special = set(self.special_token_ids)
        self._ids = {raw: token for token, raw in enumerate(self.tokens) if raw and token not in special}
        self._longest = max(map(len, self._ids), default=0)
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = eos
        if eos is None:
            # A model without an end gets one outside its vocabulary, which is never drawn.
            self.eos_token_id = vocab_size
            self.tokens = [*self.tokens, b""]
            self.special_token_ids.append(vocab_size)

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the token ids of a text that the grammar leaves no choice about, special ones excepted."""
        raw = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode(raw.decode(), add_special_tokens=False)
        special = any(map(self._tokenizer.is_special, ids))
        exact = b"".join(map(self._tokenizer.token_bytes, ids)) == raw
        return ids if exact and not special else self._longest_first(raw)

    def _longest_first(self, raw: bytes) -> list[int]:
        """Return the ids of the longest tokens that the bytes begin with, one after another.

        For texts that spell a special token, or to which the tokenizer adds something of its own.
        """
        ids: list[int] = []
        while raw:
            size = next(
                (size for size in range(min(len(raw), self._longest), 0, -1) if raw[:size] in self._ids), 0
            )
            if size == 0:
                break
            ids.append(self._ids[raw[:size]])
            raw = raw[size:]
        return ids
