"""Which tokens of a text are scored with which context.

Pure functions of numbers: no model, no tensors. `dape_engine.statistics` sums up what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dape_engine.errors import ContextLengthError, RequestError
from dape_engine.request import Window

WindowMode = Literal["full", "sliding", "disjoint", "half", "last"]
LadderKind = Literal["prefix", "suffix"]
SCORE_LAST = 256
"""Tokens scored at the end of a context in the DAPE paper's protocol."""

# The settings that each mode reads; any other one given is an error, not a silent nothing.
SETTINGS: dict[WindowMode, frozenset[str]] = {
    "full": frozenset(),
    "sliding": frozenset({"context_length", "stride"}),
    "disjoint": frozenset({"context_length"}),
    "half": frozenset({"context_length"}),
    "last": frozenset({"context_length", "score_last"}),
}


@dataclass(frozen=True, slots=True)
class WindowSettings:
    """A mode with its settings, defaults filled in; None: the mode has no such setting."""

    mode: WindowMode
    context_length: int
    stride: int | None = None
    score_last: int | None = None

    def windows(self, num_tokens: int) -> tuple[Window, ...]:
        """Return the windows of a text of the length that the settings were made for."""
        length = self.context_length
        match self.mode:
            case "full":
                return (Window(0, num_tokens, 1),)
            case "sliding":
                return _sliding(num_tokens, length, self.stride or length)
            case "disjoint":
                return _disjoint(num_tokens, length)
            case "half":
                return _half(num_tokens, length)
            case "last":
                return (_ending(num_tokens, min(length, num_tokens), self.score_last or SCORE_LAST),)


def window_settings(
    mode: WindowMode,
    num_tokens: int,
    *,
    context_length: int | None = None,
    stride: int | None = None,
    score_last: int | None = None,
    max_model_len: int | None = None,
) -> WindowSettings:
    """Return a mode's settings for one text. No window is longer than `context_length`, scored ones included.

    - "full": one window; every token but the first is scored.
    - "sliding", as in Hugging Face's guide: a window every `stride` tokens (default: half the context
      length) scores the tokens that no window before it held. With `stride` equal to `context_length` the
      first token of each window has no context, so it is not scored.
    - "disjoint", as lm-eval's rolling log-likelihood of `local-completions`, whose own `max_length` is one
      more than `context_length`, if the text's first token is the BOS or EOS that lm-eval puts there:
      windows score `context_length - 1` tokens each, from one token of context on; the last window, where
      shorter, reaches back to fill its context.
    - "half", as llama.cpp: chunks without overlap, of which only the second half is scored (see
      `with_chunk_bos`); an incomplete last chunk is dropped.
    - "last": one window at the end of the text, of which the last `score_last` (256) tokens are scored: the
      DAPE paper's protocol.

    Args:
        mode: one of the above.
        num_tokens: length of the text.
        context_length: by default the text's length, or `max_model_len` where that is less.
        stride: "sliding" only, 1 to `context_length`.
        score_last: "last" only, at least 1.
        max_model_len: longest window that the model can read.

    Raises:
        RequestError: a setting is out of range or means nothing in this mode, or the text is too short.
        ContextLengthError: "full", and the text is longer than `max_model_len`.
    """
    given = {"context_length": context_length, "stride": stride, "score_last": score_last}
    for name, value in given.items():
        if value is not None and name not in SETTINGS[mode]:
            raise RequestError(f"{name} has no meaning with window {mode!r}", param=name)
    _check_input(num_tokens)
    limit = num_tokens if max_model_len is None else max_model_len
    if mode == "full":
        if num_tokens > limit:
            raise ContextLengthError(
                f"input has {num_tokens} tokens, above max_model_len {limit}; "
                "choose another window, such as 'sliding'",
                param="input",
            )
        return WindowSettings(mode, num_tokens)
    # The first token of a half-scored chunk's second half is not scored, so two tokens are too few.
    smallest = 3 if mode == "half" else 2
    length = max(smallest, min(num_tokens, limit)) if context_length is None else context_length
    _check_range("context_length", length, smallest, max_model_len, "max_model_len")
    match mode:
        case "sliding":
            step = length // 2 if stride is None else stride
            _check_range("stride", step, 1, length, "context_length")
            return WindowSettings(mode, length, stride=step)
        case "last":
            scored = SCORE_LAST if score_last is None else score_last
            _check_range("score_last", scored, 1)
            return WindowSettings(mode, length, score_last=scored)
        case _:
            if mode == "half" and num_tokens < length:
                raise RequestError(
                    f"input has {num_tokens} tokens, window 'half' needs at least context_length {length}",
                    param="input",
                )
            return WindowSettings(mode, length)


def with_chunk_bos(
    token_ids: Sequence[int], chunks: Iterable[Window], bos_token_id: int | None
) -> tuple[int, ...]:
    """Return the tokens with the first one of every chunk replaced by BOS, as llama.cpp does for "half".

    Chunks must not overlap; their first tokens are never scored. Without a BOS token, and for a caller who
    wants none, the tokens stay as they are: what llama.cpp does for models that add no BOS.
    """
    replaced = list(token_ids)
    if bos_token_id is not None:
        for chunk in chunks:
            replaced[chunk.start] = bos_token_id
    return tuple(replaced)


@dataclass(frozen=True, slots=True)
class Rung:
    """One context length of a ladder: its scores are entries `first` to `last` of window number `window`."""

    length: int
    window: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Ladder:
    """The windows to be scored, and where in their scores each length's tokens are found."""

    windows: tuple[Window, ...]
    rungs: tuple[Rung, ...]


def ladder(
    kind: LadderKind,
    num_tokens: int,
    lengths: Sequence[int],
    *,
    score_last: int = SCORE_LAST,
    max_model_len: int | None = None,
) -> Ladder:
    """Return the plan for perplexity by context length: per length L the last min(score_last, L - 1) tokens.

    - "prefix": the first L tokens. A token's score depends only on the tokens before it, so one window over
      the greatest length answers all.
    - "suffix": the last L tokens, one window each. Where `score_last` is below every length, all of them
      score the same tokens.

    Raises:
        RequestError: a length is below 2 or above the text's or the model's length, or `score_last` below 1.
    """
    _check_input(num_tokens)
    _check_range("score_last", score_last, 1)
    if not lengths:
        raise RequestError("lengths is empty", param="lengths")
    for length in lengths:
        _check_range("lengths", length, 2, num_tokens, "the number of input tokens")
        _check_range("lengths", length, 2, max_model_len, "max_model_len")
    if kind == "suffix":
        suffixes = tuple(_ending(num_tokens, length, score_last) for length in lengths)
        return Ladder(
            suffixes,
            tuple(Rung(w.end - w.start, i, 0, w.end - w.score_from) for i, w in enumerate(suffixes)),
        )
    prefixes = [_ending(length, length, score_last) for length in lengths]
    first = min(prefix.score_from for prefix in prefixes)
    return Ladder(
        (Window(0, max(lengths), first),),
        tuple(Rung(prefix.end, 0, prefix.score_from - first, prefix.end - first) for prefix in prefixes),
    )


def covering(end: int, length: int, score_last: int) -> tuple[Window, ...]:
    """Return windows of `length` tokens that together score the `score_last` tokens before `end`.

    One window where the length is above `score_last`; else several, back to back, so that short context
    lengths are measured on the same tokens as long ones.

    Raises:
        RequestError: a window would begin before the text.
    """
    found: list[Window] = []
    while (left := score_last - sum(w.end - w.score_from for w in found)) > 0:
        last = found[-1].score_from if found else end
        if last < length:
            raise RequestError(f"{end} tokens are too few for length {length}", param="lengths")
        found.append(_ending(last, length, left))
    return tuple(found)


def _check_input(num_tokens: int) -> None:
    if num_tokens < 2:
        raise RequestError(f"input has {num_tokens} token(s), at least 2 are needed", param="input")


def _check_range(
    name: str, value: int, lowest: int, highest: int | None = None, limit: str | None = None
) -> None:
    if value < lowest:
        raise RequestError(f"{name} must be at least {lowest}, got {value}", param=name)
    if highest is not None and value > highest:
        raise RequestError(f"{name} must not be above {limit} ({highest}), got {value}", param=name)


def _ending(end: int, length: int, score_last: int) -> Window:
    """Return the window of `length` tokens that ends at `end` and scores its last tokens."""
    return Window(end - length, end, end - min(score_last, length - 1))


def _sliding(num_tokens: int, length: int, stride: int) -> tuple[Window, ...]:
    result = []
    scored = 0
    for start in range(0, num_tokens, stride):
        end = min(start + length, num_tokens)
        score_from = max(scored, start + 1)
        if score_from < end:
            result.append(Window(start, end, score_from))
        scored = end
        if end == num_tokens:
            break
    return tuple(result)


def _disjoint(num_tokens: int, length: int) -> tuple[Window, ...]:
    starts = range(1, num_tokens, length - 1)
    ends = (min(score_from + length - 1, num_tokens) for score_from in starts)
    return tuple(Window(max(0, end - length), end, first) for first, end in zip(starts, ends, strict=True))


def _half(num_tokens: int, length: int) -> tuple[Window, ...]:
    starts = range(0, num_tokens - length + 1, length)
    return tuple(Window(start, start + length, start + length // 2 + 1) for start in starts)
