"""Drawing the next token of every sequence of a step, and reporting its log-probability.

Rows are independent: a row's token is a function of its own logits, parameters and random stream, never of
the rows beside it. Letters: S rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dape_engine.errors import RequestError, StepError
from dape_engine.grammar import Constraint
from dape_engine.request import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures below this one are greedy, as in vLLM."""
HOTTEST = 1e30
"""Temperatures above this one, where all tokens are equally likely, would not fit float32."""


class SamplerState:
    """What one request carries from token to token: its random stream and the counts its penalties need.

    Args:
        params: how the completion is drawn.
        prompt: token ids that the repetition penalty counts as seen.
        eos_token_id: the end-of-text token, which `min_tokens` holds back.
        vocab_size: V; token ids of `params` must be below.
        constraint: the grammar that the completion must match; it is moved on with the text.

    Raises:
        RequestError: a token id of `params` is not in the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        eos_token_id: int | None,
        vocab_size: int,
        constraint: Constraint | None = None,
    ):
        self.params = params
        self.constraint = constraint
        self.num_generated = 0
        self._random = random.Random(params.seed)
        # Numbers for the next tokens, as far as they are known, of which this state has the one at `_ahead`.
        self._numbers = deque[float]()
        self._ahead = 0
        _check_ids("logit_bias", dict(params.logit_bias), vocab_size)
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            _check_ids(name, getattr(params, name), vocab_size)
        for words in params.bad_words:
            _check_ids("bad_words", words, vocab_size)
        ends = set(params.stop_token_ids)
        # The end that a grammar allows would be nothing but a token in a text that ignores it.
        if eos_token_id is not None and (constraint is not None or not params.ignore_eos):
            ends.add(eos_token_id)
        self._ends = sorted(ends)
        self._prompt = prompt
        self._vocab_size = vocab_size
        self._tail = deque[int](maxlen=max(map(len, params.bad_words), default=0))
        self.penalises = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )

    # Tensors are made in the engine's thread by the first step that needs them. In a client's event loop
    # each of them would wait for Python's lock, which steps hold.

    @cached_property
    def ends(self) -> Tensor:
        """Tokens that end the text."""
        return torch.tensor(self._ends, dtype=torch.int64)

    @cached_property
    def allowed(self) -> Tensor:
        """The only tokens allowed, none where all are."""
        return torch.tensor(self.params.allowed_token_ids, dtype=torch.int64)

    @cached_property
    def bias_ids(self) -> Tensor:
        """Tokens that have a bias."""
        return torch.tensor(list(dict(self.params.logit_bias)), dtype=torch.int64)

    @cached_property
    def bias(self) -> Tensor:
        """Their biases."""
        return torch.tensor(list(dict(self.params.logit_bias).values()), dtype=torch.float32)

    @cached_property
    def in_prompt(self) -> Tensor:
        """Whether each token of the vocabulary is in the prompt."""
        found = torch.zeros(self._vocab_size, dtype=torch.bool)
        found[torch.tensor(self._prompt, dtype=torch.int64)] = True
        return found

    @cached_property
    def counts(self) -> Tensor:
        """How often each token of the vocabulary has been generated."""
        return torch.zeros(self._vocab_size)

    @property
    def holds_end(self) -> bool:
        """Whether the tokens that end the text are avoided for now, where anything else may come."""
        ignores = self.constraint is not None and self.params.ignore_eos
        return ignores or self.num_generated < self.params.min_tokens

    @property
    def restricts(self) -> bool:
        """Whether only some tokens are allowed at all."""
        return self.constraint is not None or len(self.params.allowed_token_ids) > 0

    @property
    def adjusts(self) -> bool:
        """Whether the model's logits are changed before the draw."""
        params = self.params
        changes = self.penalises or self.holds_end or len(params.logit_bias) > 0 or len(params.bad_words) > 0
        return changes or self.restricts

    def restrict(self, logits: Tensor) -> None:
        """Set the logits float32 [V] of tokens that are not allowed to minus infinity, in place."""
        if len(self.params.allowed_token_ids) > 0:
            kept = logits[self.allowed]
            logits.fill_(-math.inf)
            logits[self.allowed] = kept
        if self.constraint is not None:
            self.constraint.restrict(logits)

    def completing(self) -> list[int]:
        """Return the tokens that would complete one of the bad words now."""
        text = list(self._tail)
        return [
            word[-1]
            for word in self.params.bad_words
            if len(word) == 1 or text[len(text) - len(word) + 1 :] == list(word[:-1])
        ]

    def append(self, token: int) -> None:
        """Count a generated token."""
        self.num_generated += 1
        self._tail.append(token)
        if self._numbers:
            self._numbers.popleft()
        if self.constraint is not None:
            self.constraint.append(token)
        if self.penalises:
            # They are made within a step, and tensors made in inference mode change in no other.
            with torch.inference_mode():
                self.counts[token] += 1

    def uniform(self) -> float:
        """Return the number in [0, 1) that draws the next token, the same one until it is appended."""
        while len(self._numbers) <= self._ahead:
            self._numbers.append(self._random.random())
        return self._numbers[self._ahead]

    def behind(self, tokens: Sequence[int]) -> SamplerState:
        """Return the state as it will be if tokens are appended, for one draw before that is known.

        Only without a constraint, which has no way back.
        """
        if not self.adjusts and self.params.temperature < GREEDY_BELOW:
            return self
        state = copy(self)
        state._ahead += len(tokens)
        state.num_generated += len(tokens)
        state._tail = deque((*self._tail, *tokens), maxlen=self._tail.maxlen)
        if self.penalises:
            state.counts = self.counts.clone()
            for token in tokens:
                state.counts[token] += 1
        return state

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device, where they stay."""
        names = ["ends", "allowed", "bias_ids", "bias"]
        if self.penalises:
            names += ["in_prompt", "counts"]
        for name in names:
            setattr(self, name, getattr(self, name).to(device))


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name}: token id {token} is not in 0..{vocab_size - 1}", param=name)


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[TokenLogprob]:
    """Draw one token per row; appending it to its state is the caller's part.

    In this order: what is allowed at all (a grammar, allowed_token_ids), then as in vLLM logit_bias,
    penalties, bad_words and min_tokens, temperature, min_p, top_k, top_p. Where what comes after the first
    leaves nothing to choose from, it does not count. The most likely token always survives the filters,
    and tokens as likely as the last one kept are kept too.

    Args:
        logits: float32 [S, V], not changed.
        states: one per row.

    Returns:
        Per row the token, its log-probability under the model (NaN if no row asks for any), as many of the
        most likely tokens as `logprobs` asks for and those of `logprob_token_ids`, read from the same
        numbers: where the token is the most likely one, its log-probability equals the first alternative's
        to the bit.

    Raises:
        StepError: a logit is not finite.
    """
    adjusted = _adjust(logits, states)
    tokens = adjusted.max(-1).indices
    drawn = [row for row, state in enumerate(states) if state.params.temperature >= GREEDY_BELOW]
    if drawn:
        tokens[drawn] = _draw(adjusted[drawn], [states[row] for row in drawn])
    return _report(logits, tokens, [state.params for state in states])


def _adjust(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Return the logits [S, V] with restrictions, biases, penalties, bad words and min_tokens applied."""
    changed = [row for row, state in enumerate(states) if state.adjusts]
    if not changed:
        return logits
    allowed = logits
    if any(states[row].restricts for row in changed):
        allowed = logits.clone()
    for row in changed:
        states[row].to(logits.device)
        states[row].restrict(allowed[row])
    adjusted = allowed.clone()
    for row in changed:
        adjusted[row].index_add_(0, states[row].bias_ids, states[row].bias)
    _penalise(adjusted, states)
    for row in changed:
        adjusted[row, states[row].completing()] = -math.inf
        if states[row].holds_end:
            adjusted[row].index_fill_(0, states[row].ends, -math.inf)
    # Where nothing is left to choose from, what is allowed is better than nothing.
    usable = adjusted.amax(-1, keepdim=True).isfinite()
    return torch.where(usable, adjusted, allowed)


def _penalise(logits: Tensor, states: Sequence[SamplerState]) -> None:
    """Apply the penalties in place, by vLLM's definitions, to the rows that have any."""
    rows = [row for row, state in enumerate(states) if state.penalises]
    if not rows:
        return
    params = [states[row].params for row in rows]
    counts = torch.stack([states[row].counts for row in rows])
    seen = torch.stack([states[row].in_prompt for row in rows]) | (counts > 0)
    values = logits[rows]
    repetition = _column([p.repetition_penalty for p in params], logits)
    values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
    values -= _column([p.frequency_penalty for p in params], logits) * counts
    values -= _column([p.presence_penalty for p in params], logits) * (counts > 0)
    logits[rows] = values


def _draw(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Return the tokens int64 [S] drawn from filtered distributions, by inverting their cumulative sums."""
    params = [state.params for state in states]
    temperature = _column([min(p.temperature, HOTTEST) for p in params], logits)
    # With the largest value at 0 no temperature, however low, can overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    lowest = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], logits)
    cut = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if cut:
        lowest[cut] = _cut_off(scaled[cut], lowest[cut], [params[row] for row in cut])
    if cut or any(p.min_p > 0 for p in params):
        scaled.masked_fill_(scaled < lowest, -math.inf)
    masses = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = _column([state.uniform() for state in states], logits, torch.float64) * masses[:, -1:]
    # A number below 1 times the total is below the total, so the index is below V.
    return torch.searchsorted(masses, target, right=True)[:, 0]


def _cut_off(scaled: Tensor, lowest: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return the lowest value kept, [S, 1]: `lowest` raised by top-k, then by top-p of what is left."""
    vocab_size = scaled.shape[1]
    values = _ascending(scaled)
    size = _column([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], scaled, torch.int64)
    lowest = torch.maximum(lowest, values.gather(1, vocab_size - size))
    masses = values.softmax(-1).cumsum(-1, dtype=torch.float64)
    first = torch.searchsorted(values, lowest)
    below = masses.gather(1, (first - 1).clamp_(min=0)).where(first > 0, 0.0)
    share = _column([max(1 - p.top_p, 0.0) for p in params], scaled, torch.float64)
    place = torch.searchsorted(masses, below + share * (masses[:, -1:] - below), right=True)
    return values.gather(1, place.clamp_(max=vocab_size - 1))


def _ascending(values: Tensor) -> Tensor:
    """Return the rows sorted."""
    if values.device.type == "cpu":
        # numpy sorts with vector instructions: twenty times as fast as torch on a CPU.
        return torch.from_numpy(np.sort(values.numpy(), -1))
    return values.sort(-1).values


def _report(logits: Tensor, tokens: Tensor, params: Sequence[SamplingParams]) -> list[TokenLogprob]:
    """Return the log-probabilities of the tokens [S] and of the others that each row asks for, if any.

    Raises:
        StepError: a logit is not finite.
    """
    # One copy brings both from the device.
    *drawn, finite = torch.cat([tokens, logits.sum().isfinite()[None]]).tolist()
    if not finite:
        raise StepError("the model's logits are not finite")
    if all(p.logprobs is None and not p.logprob_token_ids for p in params):
        # The sum over the vocabulary costs as much as drawing a token.
        return [TokenLogprob(token, math.nan) for token in drawn]
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    tops = [p.logprobs or 0 for p in params]
    others: list[tuple[tuple[int, float], ...]] = [()] * len(tops)
    rows = [row for row, top in enumerate(tops) if top > 0]
    if rows:
        values, ids = logprobs[rows].topk(min(max(tops), logits.shape[1]))
        for row, row_ids, row_values in zip(rows, ids.tolist(), values.tolist(), strict=True):
            others[row] = tuple(zip(row_ids[: tops[row]], row_values[: tops[row]], strict=True))
    for row, p in enumerate(params):
        if p.logprob_token_ids:
            known = {token for token, _ in others[row]}
            asked = [token for token in dict.fromkeys(p.logprob_token_ids) if token not in known]
            others[row] += tuple(zip(asked, logprobs[row, asked].tolist(), strict=True))
    return list(map(TokenLogprob, drawn, own, others))


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
