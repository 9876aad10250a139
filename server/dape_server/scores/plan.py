"""From a perplexity request to the windows of each input, with its cost known before the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dape_engine.errors import RequestError
from dape_engine.request import Window
from dape_engine.scoring import SCORE_LAST, Rung, ladder, window_settings, with_chunk_bos
from dape_server.limits import MAX_INPUT_TOKENS, MAX_LOGPROB_ENTRIES, MAX_READ_TOKENS, MAX_WINDOWS
from dape_server.protocol.perplexity import PerplexityRequest, WindowUsed
from dape_server.scores.inputs import Input


@dataclass(frozen=True, slots=True)
class Plan:
    """What is scored of one input."""

    token_ids: tuple[int, ...]
    """As the model reads them."""
    used: WindowUsed
    windows: tuple[Window, ...]
    num_own: int
    """The first so many windows give the input's own statistics, the others only the ladder's."""
    rungs: tuple[Rung, ...]


def make_plans(body: PerplexityRequest, inputs: Sequence[Input], max_model_len: int) -> list[Plan]:
    """Return what is scored of every input.

    Raises:
        RequestError: settings are out of range or do not fit an input, or the work is above a limit; the
            message holds what it comes to.
    """
    tokens = sum(len(given.token_ids) for given in inputs)
    _check("input", f"{_inputs(inputs)}, {tokens} tokens in all,", tokens, MAX_INPUT_TOKENS, "tokens")
    for field, advance in (("stride", body.stride), ("context_length", body.context_length)):
        if advance and body.window in ("sliding", "disjoint", "half"):
            # Windows are counted before they are made, as far as that can be told.
            count = tokens // advance
            cost = f"{tokens} tokens / {advance} = {count} windows or more"
            _check(field, cost, count, MAX_WINDOWS, "windows")
            break
    plans = [_plan(body, given, max_model_len) for given in inputs]
    windows = [window for plan in plans for window in plan.windows]
    _check("input", f"{len(windows)} windows", len(windows), MAX_WINDOWS, "windows")
    read = sum(window.end - window.start for window in windows)
    cost = f"{len(windows)} windows of {read / max(1, len(windows)):.0f} tokens on average, {read} in all,"
    _check("input", cost, read, MAX_READ_TOKENS, "tokens read")
    if body.return_token_logprobs:
        values = tokens * (1 + body.top_logprobs)
        cost = f"{tokens} tokens x (1 + {body.top_logprobs}) = {values} values"
        _check("top_logprobs", cost, values, MAX_LOGPROB_ENTRIES, "values")
    return plans


def _inputs(inputs: Sequence[Input]) -> str:
    longest = max(len(given.token_ids) for given in inputs)
    return f"{len(inputs)} input(s) of at most {longest} tokens"


def _check(field: str, cost: str, value: int, limit: int, unit: str) -> None:
    if value > limit:
        raise RequestError(f"{field}: {cost} are above the limit of {limit} {unit} a request", param=field)


def _plan(body: PerplexityRequest, given: Input, max_model_len: int) -> Plan:
    token_ids = given.token_ids
    used, own = _own_windows(body, len(token_ids), max_model_len)
    chosen = list(own)
    rungs: tuple[Rung, ...] = ()
    if body.lengths is not None:
        steps = ladder(
            body.ladder or "prefix",
            len(token_ids),
            body.lengths,
            score_last=_score_last(body),
            max_model_len=max_model_len,
        )
        starts = {window.start: index for index, window in enumerate(own)}
        places = [_place(window, own, starts, chosen) for window in steps.windows]
        rungs = tuple(_moved(rung, *places[rung.window]) for rung in steps.rungs)
    if body.window == "half":
        # An input that begins with BOS is of a model that expects it in every context.
        token_ids = with_chunk_bos(token_ids, own, given.bos)
    return Plan(token_ids, used, tuple(chosen), len(own), rungs)


def _score_last(body: PerplexityRequest) -> int:
    return SCORE_LAST if body.score_last is None else body.score_last


def _own_windows(
    body: PerplexityRequest, num_tokens: int, max_model_len: int
) -> tuple[WindowUsed, tuple[Window, ...]]:
    only_ladder = body.window is None and (body.context_length, body.stride) == (None, None)
    if body.lengths is not None and only_ladder and num_tokens > max_model_len:
        greatest = max(body.lengths)
        kind = body.ladder or "prefix"
        last = _score_last(body)
        steps = ladder(kind, num_tokens, [greatest], score_last=last, max_model_len=max_model_len)
        used: WindowUsed = {
            "mode": "prefix" if kind == "prefix" else "last",
            "context_length": greatest,
            "stride": None,
            "score_last": last,
        }
        return used, steps.windows
    mode = body.window or "full"
    settings = window_settings(
        mode,
        num_tokens,
        context_length=body.context_length,
        stride=body.stride,
        score_last=body.score_last if mode == "last" or body.lengths is None else None,
        max_model_len=max_model_len,
    )
    used = {
        "mode": mode,
        "context_length": settings.context_length,
        "stride": settings.stride,
        "score_last": settings.score_last,
    }
    return used, settings.windows(num_tokens)


def _place(
    wanted: Window, own: Sequence[Window], starts: Mapping[int, int], chosen: list[Window]
) -> tuple[int, int]:
    """Return the window that gives the wanted scores, and how many of its scores come before them.

    A score depends on nothing behind it, so a longer window with the same start serves a shorter one.
    """
    index = starts.get(wanted.start)
    if index is not None:
        window = own[index]
        if window.score_from <= wanted.score_from and window.end >= wanted.end:
            return index, wanted.score_from - window.score_from
    chosen.append(wanted)
    return len(chosen) - 1, 0


def _moved(rung: Rung, window: int, shift: int) -> Rung:
    return Rung(rung.length, window, rung.first + shift, rung.last + shift)
