"""Tokens are drawn from the distribution that the parameters describe, each row for itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dape_engine.errors import RequestError, StepError
from dape_engine.request import SamplingParams
from dape_engine.sampling import SamplerState, sample

EOS = 0
PROMPT = [3, 3, 5]


def state(prompt: list[int] | None = None, *, vocab_size: int = 7, **params: Any) -> SamplerState:
    return SamplerState(SamplingParams(**params), prompt or [], EOS, vocab_size)


def draw(logits: list[float], **params: Any) -> int:
    """Return one token for one row of logits."""
    return sample(torch.tensor([logits]), [state(vocab_size=len(logits), **params)])[0].token_id


def frequencies(logits: list[float], draws: int, generated: list[int], **params: Any) -> np.ndarray:
    """Return how often each token is drawn by as many requests with different seeds."""
    states = [state(PROMPT, vocab_size=len(logits), seed=seed, **params) for seed in range(draws)]
    for one in states:
        for token in generated:
            one.append(token)
    tokens = [entry.token_id for entry in sample(torch.tensor([logits] * draws), states)]
    return np.bincount(tokens, minlength=len(logits)) / draws


def distribution(logits: list[float], generated: list[int], params: SamplingParams) -> np.ndarray:
    """The definition, one token after the other in float64."""
    values = np.array(logits, dtype=np.float64)
    for token, bias in params.logit_bias:
        values[token] += bias
    for token in range(len(values)):
        count = generated.count(token)
        if count or token in PROMPT:
            factor = params.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    chances = np.exp((values - values.max()) / params.temperature)
    chances[chances < params.min_p] = 0
    order = np.argsort(-chances)
    chances[order[params.top_k or len(order) :]] = 0
    before = np.cumsum(chances[order]) - chances[order]
    chances[order[before >= params.top_p * chances.sum()]] = 0
    return np.asarray(chances / chances.sum())


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.95},
        {"top_k": 4, "top_p": 0.86},
        {"min_p": 0.3},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
        {"top_p": 0.6, "min_p": 0.3, "temperature": 3.0},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 0.9},
        {"frequency_penalty": 0.6},
        {"logit_bias": ((1, 1.5), (6, -2.0))},
        {
            "repetition_penalty": 1.3,
            "presence_penalty": -0.4,
            "frequency_penalty": 0.5,
            "logit_bias": ((3, 1.0),),
            "top_k": 6,
            "top_p": 0.9,
            "min_p": 0.02,
            "temperature": 0.8,
        },
    ],
    ids=str,
)
def test_tokens_come_as_often_as_the_definition_says(params: dict[str, Any]) -> None:
    logits, generated, draws = [1.1, 0.2, 2.0, 1.4, -0.3, 0.9, -1.0], [2, 2, 6], 3_000
    expected = distribution(logits, generated, SamplingParams(**params))
    seen = frequencies(logits, draws, generated, **params)
    assert (seen[expected == 0] == 0).all()
    assert (np.abs(seen - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / draws)).all()


@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=30, unique=True),
    top_k=st.integers(0, 32),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.05, 5.0),
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_only_tokens_that_the_filters_keep_are_drawn(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    params: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    states = [state(seed=seed, vocab_size=len(logits), **params) for seed in range(50)]
    drawn = {entry.token_id for entry in sample(torch.tensor([logits] * 50), states)}
    # A hair wider, so that rounding at the very edge of a filter is no failure.
    wider = SamplingParams(**{**params, "top_p": top_p + 1e-6, "min_p": min_p * (1 - 1e-6)})
    assert drawn <= set(np.flatnonzero(distribution(logits, [], wider)))


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_greedy_takes_the_most_likely_token(temperature: float) -> None:
    logits = [0.1, 3.0, 2.9, -5.0]
    assert {draw(logits, temperature=temperature, top_k=3, seed=seed) for seed in range(20)} == {1}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-30}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_filters_leave_the_most_likely_token(params: dict[str, Any]) -> None:
    logits = [0.1, 3.0, 2.9, -5.0]
    assert {draw(logits, temperature=2.0, seed=seed, **params) for seed in range(20)} == {1}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}], ids=str)
def test_tokens_as_likely_as_the_last_one_kept_are_kept(params: dict[str, Any]) -> None:
    assert {draw([2.0, 0.0, 2.0, 2.0], seed=seed, **params) for seed in range(40)} == {0, 2, 3}


@pytest.mark.parametrize("params", [{}, {"top_k": 1000}, {"top_p": 1.0, "top_k": 5}], ids=str)
def test_filters_that_keep_all_keep_all(params: dict[str, Any]) -> None:
    assert {draw([0.0] * 5, seed=seed, **params) for seed in range(60)} == set(range(5))


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 2.0, 1e30, 1e300])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_no_temperature_overflows(temperature: float, scale: float) -> None:
    logits = [scale * value for value in (-3.0, 1.0, 0.5, 0.0)]
    token = draw(logits, temperature=temperature, top_p=0.9, seed=1)
    assert token == 1 if scale / temperature > 1e3 else 0 <= token < 4


def test_the_edges_of_the_random_stream_meet_no_token_that_is_filtered_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edges = iter([0.0, math.nextafter(1.0, 0.0)])
    monkeypatch.setattr(SamplerState, "uniform", lambda _: next(edges))
    entries = sample(torch.tensor([[-1.0, 3.0, 2.0, -2.0]] * 2), [state(vocab_size=4, top_k=2)] * 2)
    assert [entry.token_id for entry in entries] == [1, 2]


def test_the_hottest_row_still_holds_back_the_end() -> None:
    assert 0 not in {draw([9.0, 1.0, 2.0], temperature=1e300, min_tokens=1, seed=seed) for seed in range(20)}


def test_a_hot_row_is_uniform() -> None:
    seen = frequencies([5.0, 0.0, -5.0, 1.0, 2.0, 3.0], 6000, [], temperature=1e30)
    assert np.abs(seen - 1 / 6).max() < 0.025


ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.8},
    {"seed": 3, "top_k": 4, "temperature": 1.7},
    {"seed": 4, "min_p": 0.1},
    {"seed": 5, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"seed": 6, "logit_bias": ((9, 2.0),), "min_tokens": 4, "stop_token_ids": (2,)},
    {"temperature": 0.0, "presence_penalty": 1.5},
]


def run(rows: list[int], steps: int = 12) -> dict[int, list[int]]:
    """Let the rows named generate side by side from logits that depend on their own text alone."""
    states = [state(PROMPT, vocab_size=33, **ROWS[row]) for row in rows]
    tokens: dict[int, list[int]] = {row: [] for row in rows}
    for _ in range(steps):
        logits = torch.stack([logits_after(tokens[row]) for row in rows])
        for row, one, entry in zip(rows, states, sample(logits, states), strict=True):
            one.append(entry.token_id)
            tokens[row].append(entry.token_id)
    return tokens


def logits_after(tokens: list[int]) -> Tensor:
    return torch.randn(33, generator=torch.Generator().manual_seed(hash(tuple(tokens)))) * 2


def test_a_row_draws_the_same_alone_and_in_any_company() -> None:
    together = run(list(range(len(ROWS))))
    assert run([6, 2, 5, 0]) == {row: together[row] for row in (6, 2, 5, 0)}
    for row in range(len(ROWS)):
        assert run([row])[row] == together[row]


def test_without_a_seed_every_request_draws_its_own() -> None:
    logits = torch.zeros(1, 1000)
    first, second = state(vocab_size=1000), state(vocab_size=1000)
    assert [sample(logits, [first])[0].token_id for _ in range(12)] != [
        sample(logits, [second])[0].token_id for _ in range(12)
    ]


def test_penalties_follow_the_text_as_it_grows() -> None:
    one = state(frequency_penalty=0.4, temperature=0.0)
    logits = torch.tensor([[0.0, 1.0, 0.9, 0.1, 0.0, 0.0, 0.0]])
    tokens = []
    for _ in range(5):
        tokens.append(sample(logits, [one])[0].token_id)
        one.append(tokens[-1])
    # 1.0 against 0.9, then 0.6 against 0.9, 0.6 against 0.5, 0.2 against 0.5, 0.2 against 0.1
    assert tokens == [1, 2, 1, 2, 1]


def test_the_prompt_counts_for_the_repetition_penalty_only() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.9, 0.0, 0.0]])
    repetition = state(PROMPT, temperature=0.0, repetition_penalty=1.2)
    others = state(PROMPT, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    entries = sample(logits.expand(2, -1), [repetition, others])
    assert [entry.token_id for entry in entries] == [4, 3]


def test_min_tokens_holds_back_the_ends_of_the_text() -> None:
    logits = torch.tensor([[9.0, 1.0, 8.0, 0.0, 0.0, 0.0, 7.0]] * 2)
    one = state(temperature=0.0, min_tokens=2, stop_token_ids=(2,))
    ignoring = state(temperature=0.0, min_tokens=2, stop_token_ids=(2,), ignore_eos=True)
    tokens = []
    for _ in range(3):
        entries = sample(logits, [one, ignoring])
        tokens.append(tuple(entry.token_id for entry in entries))
        one.append(tokens[-1][0])
        ignoring.append(tokens[-1][1])
    assert tokens == [(6, 0), (6, 0), (0, 0)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_everything_is_forbidden_the_model_decides(temperature: float) -> None:
    forbidden = {"min_tokens": 1, "stop_token_ids": (0, 1, 2), "temperature": temperature}
    assert draw([0.0, 50.0, 0.0], seed=1, **forbidden) == 1


def test_parameters_beyond_float32_still_give_a_token() -> None:
    far: list[dict[str, Any]] = [
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"frequency_penalty": 1e300},
        {"logit_bias": ((1, 1e300),)},
    ]
    states = [state([1], vocab_size=3, seed=1, **params) for params in far]
    for entry in sample(torch.tensor([[0.0, 5.0, 1.0]] * 4), states):
        assert 0 <= entry.token_id < 3


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
@pytest.mark.parametrize("token", [-1, 7])
def test_token_ids_outside_the_vocabulary_are_refused(name: str, token: int) -> None:
    value: Any = ((token, 1.0),) if name == "logit_bias" else (token,)
    with pytest.raises(RequestError, match=f"{name}: token id {token} is not in 0..6") as caught:
        state(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_fail_the_step(bad: float) -> None:
    logits = torch.zeros(2, 7)
    logits[1, 3] = bad
    with pytest.raises(StepError, match="not finite"):
        sample(logits, [state(temperature=0.0), state(temperature=0.0)])


def test_logprobs_are_the_models_own_whatever_the_parameters() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 4
    before = logits.clone()
    changed = SamplingParams(temperature=1.8, seed=3, logit_bias=((7, 3.0),), presence_penalty=1.0, top_k=20)
    states = [SamplerState(replace(changed, logprobs=width), PROMPT, EOS, 50) for width in (0, 3, 1000)]
    exact = logits.double().log_softmax(-1).numpy()
    for row, (entry, width) in enumerate(zip(sample(logits, states), (0, 3, 50), strict=True)):
        assert entry.logprob == pytest.approx(exact[row, entry.token_id], abs=2e-6)
        order = np.argsort(-exact[row])[:width]
        assert [token for token, _ in entry.top] == order.tolist()
        assert [value for _, value in entry.top] == pytest.approx(exact[row, order], abs=2e-6)
    assert torch.equal(logits, before)


def test_a_greedy_tokens_logprob_equals_the_best_alternatives_to_the_bit() -> None:
    logits = torch.randn(40, 333, generator=torch.Generator().manual_seed(2)) * 5
    states = [state(vocab_size=333, temperature=0.0, logprobs=1 + row % 3) for row in range(40)]
    for entry in sample(logits, states):
        assert entry.top[0] == (entry.token_id, entry.logprob)


class TestRestrictions:
    def test_only_allowed_tokens_are_drawn(self) -> None:
        found = frequencies([5.0, 1.0, 0.0, 4.0], 2000, [], allowed_token_ids=(1, 2))
        chances = np.exp([1.0, 0.0])
        assert found[[0, 3]].sum() == 0
        assert found[1] == pytest.approx(chances[0] / chances.sum(), abs=0.04)

    def test_filters_and_greedy_work_within_what_is_allowed(self) -> None:
        logits = [9.0, 1.0, 0.0, 8.0]
        assert draw(logits, allowed_token_ids=(1, 2), temperature=0) == 1
        assert draw(logits, allowed_token_ids=(1, 2), top_k=1) == 1
        assert draw(logits, allowed_token_ids=(1, 2), min_p=0.9) == 1

    def test_what_is_allowed_wins_over_everything_that_forbids_it(self) -> None:
        assert draw([9.0, 1.0], allowed_token_ids=(0,), min_tokens=5) == EOS
        assert draw([9.0, 1.0], allowed_token_ids=(1,), bad_words=((1,),)) == 1

    def test_one_row_restricts_no_other(self) -> None:
        logits = torch.tensor([[9.0, 1.0, 0.0]] * 2)
        rows = [
            state(vocab_size=3, allowed_token_ids=(1,), temperature=0),
            state(vocab_size=3, temperature=0),
        ]
        assert [entry.token_id for entry in sample(logits, rows)] == [1, 0]
        assert logits.isfinite().all()

    def test_logprobs_stay_the_models_own(self) -> None:
        logits = torch.tensor([[9.0, 1.0, 0.0]])
        restricted = state(vocab_size=3, allowed_token_ids=(1, 2), logprobs=1, temperature=0)
        (entry,) = sample(logits, [restricted])
        expected = logits.log_softmax(-1)[0]
        assert entry.logprob == pytest.approx(expected[1].item())
        assert entry.top == ((0, pytest.approx(expected[0].item())),)


class TestBadWords:
    LOGITS = [0.0, 1.0, 2.0, 3.0, 4.0]

    def after(self, generated: list[int], *words: tuple[int, ...], **params: Any) -> int:
        one = state(PROMPT, vocab_size=5, temperature=0, bad_words=words, **params)
        for token in generated:
            one.append(token)
        return sample(torch.tensor([self.LOGITS]), [one])[0].token_id

    def test_single_token_is_never_drawn(self) -> None:
        assert self.after([], (4,), (3,)) == 2

    def test_last_token_of_a_word_is_held_back_behind_the_rest_of_it_only(self) -> None:
        word = (1, 2, 4)
        assert self.after([], word) == 4
        assert self.after([2], word) == 4
        assert self.after([1, 2], word) == 3
        assert self.after([0, 3, 1, 2], word) == 3
        assert self.after([1, 2, 0], word) == 4

    def test_words_of_several_lengths_are_kept_apart(self) -> None:
        assert self.after([1, 2], (1, 2, 4), (2, 3), (0,)) == 2
        assert self.after([2], (1, 2, 4), (2, 3), (0,)) == 4

    def test_the_prompt_is_no_beginning_of_a_word(self) -> None:
        one = state([1], vocab_size=5, temperature=0, bad_words=((1, 4),))
        assert sample(torch.tensor([self.LOGITS]), [one])[0].token_id == 4


class TestAskedTokens:
    def test_are_reported_beside_the_likeliest(self) -> None:
        logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
        expected = logits.log_softmax(-1)[0].tolist()
        asking = state(vocab_size=4, temperature=0, logprobs=2, logprob_token_ids=(0, 3, 0))
        (entry,) = sample(logits, [asking])
        # Token 3 is among the likeliest already.
        assert [token for token, _ in entry.top] == [1, 3, 0]
        assert [value for _, value in entry.top] == pytest.approx([expected[1], expected[3], expected[0]])

    def test_without_the_likeliest(self) -> None:
        rows = [state(logprobs=0, logprob_token_ids=(5, 6)), state(logprobs=1), state()]
        entries = sample(torch.arange(7.0).repeat(3, 1), rows)
        assert [[token for token, _ in entry.top] for entry in entries] == [[5, 6], [6], []]


@pytest.mark.parametrize("field", ["allowed_token_ids", "logprob_token_ids", "stop_token_ids"])
def test_unknown_token_is_refused_by_field(field: str) -> None:
    with pytest.raises(RequestError, match=field):
        state(vocab_size=7, **{field: (7,)})
    with pytest.raises(RequestError, match="bad_words"):
        state(vocab_size=7, bad_words=((1, 7),))


def test_log_probabilities_are_computed_only_where_a_row_asks_for_some() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])

    def drawn(*logprobs: int | None) -> list[float]:
        states = [state(vocab_size=2, temperature=0, logprobs=wanted) for wanted in logprobs]
        return [entry.logprob for entry in sample(logits, states)]

    assert all(map(math.isnan, drawn(None, None)))
    assert drawn(None, 0) == pytest.approx([logits.log_softmax(-1)[0, 1].item()] * 2)
