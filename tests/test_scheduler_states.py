"""Requests come, run, are preempted, aborted and fail in any order; every answer stays right.

What is promised of each step is checked by the simulated engine.
"""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dape_engine.errors import QueueFullError, RequestError
from dape_engine.request import SamplingParams
from dape_engine.sequence import Sequence
from simulated_engine import HalfRight, SimulatedEngine


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_in_a_tiny_pool_ends_with_every_answer_right(seed: int) -> None:
    random = Random(seed)
    engine = SimulatedEngine(28, 1 + seed, max_num_seqs=6, max_num_batched_tokens=9)
    preempted = hits = 0
    for arrival in range(400):
        if random.random() < 0.3 and len(engine.unfinished) < 20:
            tokens = random.choices((0, 1), (9, 1), k=random.randint(2, 8))
            if random.random() < 0.3:
                engine.score(tokens, score_from=random.randint(1, len(tokens) - 1))
            else:
                engine.generate(
                    tokens,
                    max_tokens=random.randint(1, 20) * (1 + seed),
                    priority=random.randint(0, 1),
                    lookup=HalfRight(arrival) if random.random() < 0.5 else None,
                )
        if engine.unfinished and random.random() < 0.03:
            engine.step(during=partial(engine.abort, random.choice(engine.unfinished)))
        step = engine.step()
        preempted += len(step.preempted)
        hits += step.prefix_hits
    engine.run()
    assert preempted > 10
    assert hits > 50
    assert engine.accepted > 100


class SchedulerMachine(RuleBasedStateMachine):
    """Requests over two tokens come, run, are aborted and fail in any order, in tiny pools."""

    @initialize(
        num_blocks=st.integers(6, 16),
        block_size=st.integers(1, 3),
        max_num_seqs=st.integers(1, 5),
        spare_rows=st.integers(0, 9),
        max_prefill_pairs=st.sampled_from([1, 20, 1 << 20]),
    )
    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, spare_rows: int, max_prefill_pairs: int
    ) -> None:
        self.engine = SimulatedEngine(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_rows,
            max_num_queued_reqs=8,
            max_prefill_pairs=max_prefill_pairs,
        )

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        max_tokens=st.integers(0, 16),
        score_from=st.none() | st.integers(1, 13),
        priority=st.integers(0, 1),
        top=st.integers(0, 1),
        tenant=st.sampled_from("abc"),
        copies=st.integers(1, 4),
        speculates=st.booleans(),
    )
    def arrive(
        self,
        tokens: list[int],
        max_tokens: int,
        score_from: int | None,
        priority: int,
        top: int,
        tenant: str,
        copies: int,
        speculates: bool,
    ) -> None:
        """Generation where max_tokens is not 0, scoring where score_from is inside the text, or both."""
        sampling = SamplingParams(max_tokens=max_tokens) if max_tokens else None
        if score_from is not None and score_from >= len(tokens):
            score_from = None
        for copy in range(copies):
            waiting = self.engine.scheduler.waiting
            # Of the reserve of 2 only those may take of whom none waits to be admitted.
            heard = any(other.tenant == tenant for other in waiting if other not in self.preempted)
            limit = 8 if heard or not waiting else 10
            sequence = Sequence("r", list(tokens), sampling, score_from, priority, top, tenant)
            sequence.lookup = HalfRight(copy) if speculates else None
            fits = self.engine.pool.blocks_for(sequence.max_rows) <= self.engine.pool.num_blocks
            if len(waiting) < limit and sequence.num_rows and fits:
                self.engine.add(sequence)
            else:
                with pytest.raises((QueueFullError, RequestError)):
                    self.engine.scheduler.add(sequence)

    @property
    def preempted(self) -> list[Sequence]:
        """Those that wait but have been admitted."""
        return [sequence for sequence in self.engine.scheduler.waiting if sequence in self.engine.admitted]

    @rule(steps=st.integers(1, 3), background_pairs=st.sampled_from([None, (5, 7)]))
    def step(self, steps: int, background_pairs: tuple[int, int] | None) -> None:
        for _ in range(steps):
            self.engine.step(background_pairs=background_pairs)

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(self.engine.unfinished)))

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def abort_during_a_step(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self.engine.unfinished))
        self.engine.step(during=partial(self.engine.abort, victim))

    @rule()
    def fail_a_step(self) -> None:
        step = self.engine.scheduler.schedule()
        # They wait like new ones, and will be admitted in another order.
        self.engine.admitted = [one for one in self.engine.admitted if one not in step.yielded]
        for chunk in self.engine.speculator.extend(step.chunks):
            self.engine.abort(chunk.sequence)

    @invariant()
    def books_agree(self) -> None:
        self.engine.scheduler.check_invariants()
        assert {*self.engine.scheduler.running, *self.engine.scheduler.waiting} == {*self.engine.unfinished}

    def teardown(self) -> None:
        """Every request ends, within steps in proportion to the rows there are, and all blocks return."""
        if hasattr(self, "engine"):
            rows = sum(sequence.max_rows for sequence in self.engine.unfinished)
            self.engine.run(limit=3 * rows + 1)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=60, stateful_step_count=30, derandomize=True, deadline=None
)
