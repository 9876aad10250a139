"""Speculative decoding by itself: what is proposed, how much of it pays, which draws are kept."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dape_engine.cache import BlockPool
from dape_engine.request import SamplingParams, TokenLogprob
from dape_engine.sampling import SamplerState, sample
from dape_engine.scheduler import Scheduler
from dape_engine.sequence import Sequence
from dape_engine.speculation import (
    CANDIDATES,
    FORGOTTEN,
    UNLIKELY,
    PromptLookup,
    RowCosts,
    SpeculativeConfig,
    Speculator,
    verified,
)
from dape_engine.step import Chunk

VOCABULARY = 5


def lookup(count: int = 4, least: int = 2, most: int = 4) -> PromptLookup:
    return PromptLookup(
        SpeculativeConfig(num_speculative_tokens=count, prompt_lookup_min=least, prompt_lookup_max=most)
    )


class TestPromptLookup:
    def test_what_followed_the_last_tokens_before_is_proposed(self) -> None:
        tokens, chances = lookup(3).propose([9, 1, 2, 3, 4, 5, 8, 1, 2])
        assert tokens == [3, 4, 5]
        assert chances == [0.5, 0.25, 0.125]

    def test_nothing_is_proposed_without_the_shortest_run(self) -> None:
        assert lookup().propose([1, 2, 3, 4, 2]) == ([], [])
        assert lookup().propose([7]) == ([], [])

    def test_the_longest_equal_part_goes_before_a_later_one(self) -> None:
        assert lookup(1).propose([5, 1, 2, 3, 8, 1, 2, 4, 5, 1, 2])[0] == [3]

    def test_of_equally_long_parts_the_later_one_counts(self) -> None:
        assert lookup(1).propose([1, 2, 3, 8, 1, 2, 4, 9, 1, 2])[0] == [4]

    def test_a_text_that_repeats_itself_is_continued_beyond_its_end(self) -> None:
        assert lookup(4).propose([1, 2, 3, 1, 2])[0] == [3, 1, 2, 3]

    def test_chances_follow_what_came_whether_it_was_verified_or_not(self) -> None:
        right, wrong = lookup(2), lookup(2)
        text = [1, 2, 3, 1, 2]
        right.propose(text)
        wrong.propose(text)
        _, better = right.propose([*text, 3])
        _, worse = wrong.propose([*text, 4, 1, 2])
        assert better[0] == 0.5  # three equal tokens, of which nothing is known yet
        assert worse[0] < 0.4

    def test_a_proposal_that_is_always_wrong_is_no_longer_made(self) -> None:
        asked = lookup()
        text = [0, 1]
        made = []
        for token in range(2, 60):
            text += [token, 0, 1]
            made.append(bool(asked.propose(text)[0]))
        assert made[0]
        assert not any(made[40:])
        # Once it is right again for a while, it is made again.
        for _ in range(60):
            text += [7, 0, 1]
            made.append(bool(asked.propose(text)[0]))
        assert made[-1]

    @given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 3))
    @settings(deadline=None, max_examples=200)
    def test_every_proposal_has_stood_behind_the_longest_equal_part(
        self, text: list[int], least: int, more: int
    ) -> None:
        """Grown token by token or given at once; compared with a search of the whole text."""
        grown, whole = lookup(3, least, least + more), lookup(3, least, least + more)
        for end in range(1, len(text) + 1):
            grown.propose(text[:end])
        whole.propose(text)
        assert grown._proposed == whole._proposed
        sizes = range(least, least + more + 1)
        equal = {
            end: max((n for n in sizes if n <= end and text[end - n : end] == text[-n:]), default=0)
            for end in range(least, len(text))
        }
        longest = max(equal.values(), default=0)
        assert bool(longest) == bool(whole._proposed)
        # Only the latest places are compared.
        if longest and sum(size > 0 for size in equal.values()) <= CANDIDATES:
            place = max(end for end, size in equal.items() if size == longest)
            assert whole._proposed == (text[place:] * 3)[:3]


def test_draws_go_on_until_the_first_that_differs() -> None:
    drawn = [TokenLogprob(token, 0.0) for token in (4, 5, 6, 7)]
    assert verified(drawn, (4, 5, 6)) == drawn
    assert verified(drawn, (4, 8, 6)) == drawn[:2]
    assert verified(drawn, (8, 5, 6)) == drawn[:1]
    assert verified(drawn[:1], ()) == drawn[:1]


class TestRowCosts:
    def test_between_known_rows_a_line_and_beyond_them_the_root(self) -> None:
        costs = RowCosts()
        costs.observe(4, 1.0)
        costs.observe(16, 3.0)
        assert costs.seconds(4) == 1.0
        assert costs.seconds(10) == 2.0
        assert costs.seconds(64) == 6.0
        assert costs.seconds(1) == 0.5

    def test_old_costs_are_forgotten(self) -> None:
        costs = RowCosts()
        costs.observe(16, 100.0)
        for _ in range(FORGOTTEN):
            costs.observe(4, 1.0)
        assert costs.seconds(16) == 2.0

    def test_new_costs_count_more(self) -> None:
        costs = RowCosts()
        for seconds in (1.0, 2.0, 2.0, 2.0, 2.0):
            costs.observe(1, seconds)
        assert 1.7 < costs.seconds(1) < 2


class Fixed(PromptLookup):
    """Proposes five tokens of a known chance each."""

    def __init__(self, chance: float):
        super().__init__(SpeculativeConfig())
        self._chance = chance

    def propose(self, tokens: list[int]) -> tuple[list[int], list[float]]:  # noqa: ARG002 (always the same)
        return [1] * 5, [self._chance ** (ahead + 1) for ahead in range(5)]


class TestSpeculator:
    def extended(
        self, *chances: float, costs: dict[int, float], budget: int = 64, blocks: int = 64, left: int = 50
    ) -> list[int]:
        """Return how many tokens each decoding sequence gets, where steps of so many rows cost as given."""
        pool = BlockPool(blocks, 4)
        scheduler = Scheduler(pool, max_num_seqs=16, max_num_batched_tokens=budget, max_num_queued_reqs=9)
        for chance in chances:
            sampling = SamplingParams(max_tokens=left)
            scheduler.add(Sequence("r", [1, 2, 3], sampling, lookup=Fixed(chance)))
        step = scheduler.schedule()
        scheduler.commit(step.chunks)
        for chunk in step.chunks:
            chunk.sequence.tokens.append(1)
        speculator = Speculator(scheduler.blocks, budget)
        for rows, seconds in costs.items():
            speculator._is_used = True
            speculator.observe([Chunk(chunk.sequence, 3, rows) for chunk in step.chunks[:1]], seconds)
        chunks = speculator.extend(scheduler.schedule().chunks)
        scheduler.check_invariants()
        assert [chunk.count - 1 for chunk in chunks] == [len(chunk.proposed) for chunk in chunks]
        return [len(chunk.proposed) for chunk in chunks]

    def test_rows_that_cost_nothing_are_all_taken(self) -> None:
        assert self.extended(0.9, 0.3, costs={2: 1.0, 64: 1.0}) == [5, 5]

    def test_rows_that_cost_as_much_as_a_step_are_not_taken(self) -> None:
        assert self.extended(0.9, 0.9, costs={2: 1.0, 64: 32.0}) == [0, 0]

    def test_likely_tokens_go_before_unlikely_ones(self) -> None:
        assert self.extended(0.95, 0.2, costs={2: 1.0, 12: 3.5}) == [5, 0]

    def test_a_jump_in_the_cost_is_taken_only_where_enough_comes_behind_it(self) -> None:
        """Three rows cost twice as much as two, and twelve no more than three."""
        assert self.extended(0.9, 0.9, costs={2: 1.0, 3: 2.0, 12: 2.0}) == [5, 5]
        assert self.extended(0.4, 0.4, costs={2: 1.0, 3: 2.0, 12: 2.0}) == [0, 0]

    def test_the_budget_of_rows_holds(self) -> None:
        assert sum(self.extended(0.9, 0.9, costs={2: 1.0, 64: 1.0}, budget=16)) == 10
        assert sum(self.extended(0.9, 0.9, 0.9, 0.9, costs={2: 1.0, 64: 1.0}, budget=16)) == 12

    def test_free_blocks_are_enough_and_nobody_gives_up_his(self) -> None:
        """Each has one block of four rows, three of them full, and one more is free."""
        assert self.extended(1.0, 1.0, costs={2: 1.0, 64: 1.0}, blocks=3, left=5) == [3, 0]

    def test_nothing_is_proposed_behind_the_last_token(self) -> None:
        assert self.extended(1.0, costs={1: 1.0, 64: 1.0}, left=4) == [2]
        assert self.extended(1.0, costs={1: 1.0, 64: 1.0}, left=2) == [0]


SAMPLINGS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(),
    "filters": SamplingParams(temperature=1.3, top_k=4, top_p=0.9, min_p=0.05),
    "penalties": SamplingParams(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.8),
    "greedy penalties": SamplingParams(temperature=0, frequency_penalty=1.5),
    "bias": SamplingParams(logit_bias=((1, 2.0), (3, -4.0))),
    "bad words": SamplingParams(bad_words=((1, 2), (3,), (2, 2, 4))),
    "min_tokens": SamplingParams(min_tokens=4, stop_token_ids=(2,)),
    "allowed": SamplingParams(allowed_token_ids=(0, 1, 4)),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_drawn_ahead_are_those_of_plain_decoding(name: str, seed: int) -> None:
    """Whatever is proposed, with a seed the same tokens come, and their log-probabilities are the same."""
    params = SAMPLINGS[name]
    params = SamplingParams(
        **{field: getattr(params, field) for field in params.__slots__} | {"seed": seed, "logprobs": 2}
    )
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    plain = SamplerState(params, [1, 2], 0, VOCABULARY)
    expected, last = [], 2
    for _ in range(40):
        [drawn] = sample(table[[last]], [plain])
        plain.append(last := drawn.token_id)
        expected.append(drawn)
    chance = Random(seed)
    state = SamplerState(params, [1, 2], 0, VOCABULARY)
    got: list[TokenLogprob] = []
    accepted = 0
    while len(got) < len(expected):
        truth = [token.token_id for token in expected[len(got) : len(got) + 4]]
        proposed = [token if chance.random() < 0.7 else chance.randrange(VOCABULARY) for token in truth]
        last = got[-1].token_id if got else 2
        states = [state, *(state.behind(proposed[:count]) for count in range(1, len(proposed) + 1))]
        drawn_ahead = verified(sample(table[[last, *proposed]], states), proposed)
        accepted += len(drawn_ahead) - 1
        for token in drawn_ahead:
            state.append(token.token_id)
        got += drawn_ahead
    assert [token.token_id for token in got[:40]] == [token.token_id for token in expected]
    for one, other in zip(got, expected, strict=False):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert accepted > 5


def test_the_end_may_come_as_soon_as_enough_tokens_would_be_there() -> None:
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=(2,))
    state = SamplerState(params, [1], 0, VOCABULARY)
    state.append(4)
    ahead = [state, *(state.behind([4] * count) for count in (1, 2))]
    drawn = sample(torch.tensor([[0.0, 1.0, 2.0, 0.0, 1.5]] * 3), ahead)
    assert [token.token_id for token in drawn] == [4, 4, 2]


def test_the_distribution_without_seeds_is_that_of_plain_sampling() -> None:
    """Pairs of tokens over a vocabulary of five, a chi-squared test with 24 degrees of freedom."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    first = table[2].softmax(-1)
    exact = (first[:, None] * table.softmax(-1)).flatten()
    chance, counts, draws = Random(5), Counter[int](), 12_000
    for start in range(0, draws, 500):
        pairs: list[list[int]] = [[] for _ in range(500)]
        states = [
            SamplerState(SamplingParams(seed=start + index), [2], None, VOCABULARY) for index in range(500)
        ]
        # The likeliest token is proposed, or another one: neither may show.
        proposed = [[int(first.argmax()) if chance.random() < 0.5 else 3] for _ in states]
        rows = [
            state for own, token in zip(states, proposed, strict=True) for state in (own, own.behind(token))
        ]
        logits = torch.stack([table[token] for own in proposed for token in (2, own[0])])
        drawn = sample(logits, rows)
        for index, pair in enumerate(pairs):
            pair += [t.token_id for t in verified(drawn[2 * index : 2 * index + 2], proposed[index])]
        short = [index for index, pair in enumerate(pairs) if len(pair) == 1]
        for index in short:
            states[index].append(pairs[index][0])
        rest = sample(
            torch.stack([table[pairs[index][0]] for index in short]), [states[index] for index in short]
        )
        for index, token in zip(short, rest, strict=True):
            pairs[index].append(token.token_id)
        counts.update(one * VOCABULARY + two for one, two in pairs)
    statistic = sum(
        (counts[place] - draws * float(share)) ** 2 / (draws * float(share))
        for place, share in enumerate(exact)
    )
    assert statistic < 51.2  # in 99.9 % of all cases


@pytest.mark.parametrize(
    ("settings_", "what"),
    [
        ({"num_speculative_tokens": 17}, "num_speculative_tokens"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens"),
        ({"num_speculative_tokens": "4"}, "num_speculative_tokens"),
        ({"prompt_lookup_min": 0}, "prompt_lookup_min"),
        ({"prompt_lookup_max": 1}, "prompt_lookup_max 1 is below prompt_lookup_min 2"),
        ({"method": "eagle"}, "method"),
        ({"model": "small"}, "model"),
    ],
)
def test_wrong_settings_are_named(settings_: dict[str, object], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        SpeculativeConfig.model_validate(settings_)


def test_the_least_chance_is_kept() -> None:
    asked = lookup(16)
    _, chances = asked.propose([1, 2] * 9)
    assert len(chances) < 16
    assert all(chance >= UNLIKELY for chance in chances)
