"""Steps are full but bounded, nobody waits for ever, and every row meets exactly its own prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dape_engine.cache import BlockPool, CacheInvariantError, NoFreeBlocksError, extend_block_keys
from dape_engine.errors import ContextLengthError, QueueFullError, RequestError, SettingsError
from dape_engine.request import SamplingParams
from dape_engine.scheduler import Chunk, Scheduler, Step
from dape_engine.sequence import Sequence


def next_token(prefix: tuple[int, ...]) -> int:
    """Stand for a model: the next token depends on every token before it, and only on them."""
    return (sum((place + 1) * token for place, token in enumerate(prefix)) + len(prefix)) % 3


def pairs(chunk: Chunk) -> int:
    return sum(position + 1 for position in range(chunk.start, chunk.start + chunk.count))


class Engine:
    """A scheduler with a simulated model, whose cache stores in each slot the whole prefix it stands for.

    Each row checks that the cache holds exactly its own prefix, so a block that was shared wrongly,
    written while shared, taken too early or never filled is found at once.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 4,
        *,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_num_queued_reqs: int = 100,
        max_prefill_pairs: int = 1 << 20,
    ):
        self.pool = BlockPool(num_blocks, block_size)
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_batched_tokens
        self.max_prefill_pairs = max_prefill_pairs
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_queued_reqs=max_num_queued_reqs,
            max_prefill_pairs=max_prefill_pairs,
        )
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.unfinished: list[Sequence] = []
        self.scored: dict[Sequence, list[int]] = {}
        self.admitted: list[Sequence] = []

    def generate(self, tokens: list[int], max_tokens: int = 1, priority: int = 0) -> Sequence:
        return self.add(Sequence("g", list(tokens), SamplingParams(max_tokens=max_tokens), priority=priority))

    def score(self, tokens: list[int], score_from: int = 1, priority: int = 1) -> Sequence:
        return self.add(Sequence("s", list(tokens), score_from=score_from, priority=priority))

    def add(self, sequence: Sequence) -> Sequence:
        self.scheduler.add(sequence)
        self.unfinished.append(sequence)
        self.scored[sequence] = []
        return sequence

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.abort(sequence)
        self.unfinished.remove(sequence)

    def step(self, during: Callable[[], None] = lambda: None) -> Step:
        """Run one step as the real engine does; `during` happens before the model has run."""
        computed = {sequence: sequence.num_computed for sequence in self.scheduler.running}
        decoding = [sequence for sequence in self.scheduler.running if sequence.is_decoding]
        step = self.scheduler.schedule()
        self.scheduler.check_invariants()
        self.check(step, computed, decoding)
        during()
        for chunk in step.chunks:
            self.compute(chunk)
        self.scheduler.commit(step)
        for chunk in step.chunks:
            if chunk.sequence in self.scheduler.running:
                self.advance(chunk)
        self.scheduler.check_invariants()
        return step

    def check(self, step: Step, computed: dict[Sequence, int], decoding: list[Sequence]) -> None:
        """Check what is promised of every single step."""
        running = list(self.scheduler.running)
        assert len(running) <= self.max_num_seqs
        self.check_order(running)
        chunks = {chunk.sequence: chunk for chunk in step.chunks}
        assert len(chunks) == len(step.chunks)
        assert sum(chunk.count for chunk in step.chunks) <= self.budget
        assert all(sequence in chunks or sequence in step.preempted for sequence in decoding)
        if self.unfinished:
            assert step.chunks[0].sequence is running[0], "the first admitted always goes on"
        for chunk in step.chunks:
            before = computed.get(chunk.sequence, 0)
            taken = chunk.start - before
            assert taken >= 0
            assert taken % self.pool.block_size == 0
            assert not taken or chunk.start <= chunk.sequence.first_needed_row
            assert chunk.count >= 1
            assert chunk.start + chunk.count <= chunk.sequence.num_rows
        prefills = [chunk for chunk in step.chunks if not chunk.sequence.is_decoding]
        if len(prefills) < len(step.chunks) and prefills:
            overdraft = pairs(min(prefills, key=lambda chunk: running.index(chunk.sequence)))
            assert sum(map(pairs, prefills)) <= self.max_prefill_pairs + overdraft

    def check_order(self, running: list[Sequence]) -> None:
        """Admitted sequences keep their order for ever, and those running are the head of it."""
        self.admitted += [sequence for sequence in running if sequence not in self.admitted]
        preempted = [sequence for sequence in self.scheduler.waiting if sequence in self.admitted]
        assert running + preempted == [sequence for sequence in self.admitted if sequence in self.unfinished]
        for sequence in running:
            keys: list[bytes] = []
            extend_block_keys(keys, sequence.tokens, self.pool.block_size, len(sequence.block_keys))
            assert sequence.block_keys == keys
            assert len(keys) <= len(sequence.tokens) // self.pool.block_size
            assert sequence.num_cached <= sequence.num_computed

    def compute(self, chunk: Chunk) -> None:
        sequence, size = chunk.sequence, self.pool.block_size
        for position in range(chunk.start, chunk.start + chunk.count):
            block = sequence.blocks[position // size]
            holders = [other for other in self.scheduler.running if block in other.blocks]
            assert holders in ([sequence], []), "a block that is written is shared"
            self.memory[block, position % size] = tuple(sequence.tokens[: position + 1])
        end = chunk.start + chunk.count
        for position in range(end):
            slot = sequence.blocks[position // size], position % size
            assert self.memory[slot] == tuple(sequence.tokens[: position + 1])

    def advance(self, chunk: Chunk) -> None:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        if sequence.score_from is not None:
            first = max(chunk.start, sequence.score_from + sequence.num_scored - 1)
            new = [row + 1 for row in range(first, min(end, sequence.prompt_length - 1))]
            self.scored[sequence] += new
            sequence.num_scored += len(new)
        if end < sequence.num_rows:
            return
        if sequence.sampling is not None:
            sequence.tokens.append(next_token(tuple(sequence.tokens)))
        if sequence.sampling is None or sequence.num_generated == sequence.sampling.max_tokens:
            self.scheduler.finish(sequence)
            self.unfinished.remove(sequence)
            self.check_answer(sequence)

    def check_answer(self, sequence: Sequence) -> None:
        expected = sequence.tokens[: sequence.prompt_length]
        for _ in range(sequence.num_generated):
            expected.append(next_token(tuple(expected)))
        assert sequence.tokens == expected
        if sequence.score_from is not None:
            assert self.scored[sequence] == list(range(sequence.score_from, sequence.prompt_length))

    def run(self, limit: int = 1000) -> list[Step]:
        """Run until all is done; fail after `limit` steps."""
        steps: list[Step] = []
        while self.unfinished:
            assert len(steps) < limit, f"{len(self.unfinished)} sequences still wait"
            steps.append(self.step())
        assert self.pool.num_free == self.pool.num_blocks
        self.pool.check_invariants([])
        return steps


def counts(step: Step, *sequences: Sequence) -> list[int]:
    """Return the rows that each sequence has in a step."""
    rows = {chunk.sequence: chunk.count for chunk in step.chunks}
    return [rows.get(sequence, 0) for sequence in sequences]


def text(length: int, seed: int = 0) -> list[int]:
    """Return tokens that share no first block with those of another seed."""
    return [seed, *(position % 7 for position in range(length - 1))]


def test_one_request_is_prefilled_in_chunks_and_then_decoded() -> None:
    engine = Engine(20)
    request = engine.generate(text(37), max_tokens=3)
    steps = engine.run()
    assert [counts(step, request)[0] for step in steps] == [16, 16, 5, 1, 1]


def test_the_last_token_of_a_scored_text_is_never_read() -> None:
    engine = Engine(20)
    request = engine.score(text(17), score_from=5)
    assert [counts(step, request)[0] for step in engine.run()] == [16]
    assert engine.scored[request] == list(range(5, 17))


def test_decoding_sequences_come_first_and_never_wait_for_a_long_prompt() -> None:
    engine = Engine(100)
    talkers = [engine.generate(text(2, seed), max_tokens=20) for seed in range(3)]
    engine.step()
    long = engine.generate(text(64, 9))
    for _ in range(4):
        assert counts(engine.step(), *talkers, long) == [1, 1, 1, 13]


def test_a_short_prompt_passes_a_long_one_which_still_goes_on() -> None:
    engine = Engine(200)
    long = engine.generate(text(400, 1))
    engine.step()
    short = engine.generate(text(9, 2))
    assert counts(engine.step(), long, short) == [7, 9]
    assert short not in engine.unfinished


def test_a_long_prompt_keeps_its_share_in_an_endless_stream_of_short_ones() -> None:
    engine = Engine(300)
    long = engine.generate(text(400, 1))
    for seed in range(2, 102):
        engine.generate(text(16, seed))
        engine.step()
    assert long not in engine.unfinished


def test_equal_prompts_are_finished_one_by_one_rather_than_all_at_the_end() -> None:
    engine = Engine(200)
    requests = [engine.generate(text(32, seed)) for seed in range(4)]
    done = []
    while engine.unfinished:
        engine.step()
        done.append(sum(request not in engine.unfinished for request in requests))
    assert done == [0, 1, 1, 2, 2, 3, 3, 4]


def test_late_chunks_shrink_while_someone_decodes_so_that_a_step_stays_short() -> None:
    engine = Engine(200, max_num_batched_tokens=64, max_prefill_pairs=1600)
    talker = engine.generate(text(2), max_tokens=200)
    engine.step()
    long = engine.generate(text(500, 1))
    sizes = [counts(engine.step(), long)[0] for _ in range(60)]
    assert sizes[0] == 56, "56 * 57 / 2 = 1596 pairs"
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 4, "one block"
    engine.abort(talker)
    assert counts(engine.step(), long) == [64]


def test_a_short_prompt_passes_a_long_one_also_while_someone_decodes() -> None:
    engine = Engine(200, max_num_batched_tokens=64, max_prefill_pairs=1600)
    engine.generate(text(2), max_tokens=200)
    long = engine.generate(text(500, 1))
    for _ in range(5):
        engine.step()
    short = engine.generate(text(20, 2))
    assert long.num_computed > 100
    assert counts(engine.step(), short) == [20]


def test_chunks_are_as_large_as_the_budget_where_nobody_decodes() -> None:
    engine = Engine(60, max_prefill_pairs=1)
    ending, long = engine.score(text(18, 1)), engine.score(text(40, 2))
    assert counts(engine.step(), ending, long) == [16, 0]
    assert counts(engine.step(), ending, long) == [1, 15]


def test_one_block_of_rows_is_granted_however_small_the_bound_on_pairs() -> None:
    engine = Engine(50, max_prefill_pairs=1)
    engine.generate(text(2), max_tokens=30)
    engine.step()
    long, other = engine.generate(text(60, 1)), engine.generate(text(8, 2))
    assert counts(engine.step(), long, other) == [4, 0]
    engine.run()


def test_a_common_prefix_is_computed_once() -> None:
    engine = Engine(30)
    first = engine.generate(text(11))
    engine.step()
    second = engine.generate([*text(11)[:9], 8, 8])
    step = engine.step()
    assert step.prefix_queries == 11
    assert step.prefix_hits == second.num_cached == 8
    assert counts(step, second) == [3]
    assert first.num_cached == 0


def test_a_whole_cached_prompt_still_computes_the_row_that_gives_the_next_token() -> None:
    engine = Engine(30)
    engine.generate(text(8))
    engine.run()
    again = engine.generate(text(8))
    assert counts(engine.step(), again) == [4]
    assert again.num_cached == 4


def test_scored_rows_are_computed_even_where_the_prefix_is_known() -> None:
    engine = Engine(30)
    engine.generate(text(16))
    engine.run()
    request = engine.score(text(16), score_from=10)
    engine.run()
    assert request.num_cached == 8


def test_completions_of_one_prompt_that_arrive_together_share_its_blocks() -> None:
    engine = Engine(40, max_num_batched_tokens=64)
    requests = [engine.generate(text(33), max_tokens=2) for _ in range(4)]
    steps = engine.run()
    assert sum(chunk.count for step in steps for chunk in step.chunks) == 33 + 3 * 1 + 4
    assert [request.num_cached for request in requests] == [0, 32, 32, 32]
    assert sum(step.prefix_queries for step in steps) == 4 * 33
    assert sum(step.prefix_hits for step in steps) == 3 * 32


def test_a_prefix_is_not_continued_from_the_middle_of_an_own_block() -> None:
    engine = Engine(40, max_num_batched_tokens=20)
    request, scored = engine.generate(text(40)), engine.score(text(40), priority=0)
    assert counts(engine.step(), request, scored) == [5, 15]
    engine.step()
    assert request.num_cached == 0
    engine.run()


def test_when_blocks_run_out_the_last_admitted_starts_again_and_all_answers_are_right() -> None:
    engine = Engine(6)
    first, second = (engine.generate(text(4, seed), max_tokens=17) for seed in (1, 2))
    steps = engine.run()
    assert [step.preempted for step in steps if step.preempted] == [[second]]
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert second.num_cached > 0, "its own first blocks were still there"
    assert sum(step.prefix_queries for step in steps) == 8
    assert sum(step.prefix_hits for step in steps) == 0


def test_a_preempted_sequence_goes_before_all_that_wait_whatever_their_priority() -> None:
    engine = Engine(6)
    engine.generate(text(4, 1), max_tokens=17)
    victim = engine.generate(text(4, 2), max_tokens=17, priority=5)
    while not victim.num_preemptions:
        engine.step()
    newcomer = engine.generate(text(4, 3), priority=-1)
    assert engine.scheduler.waiting == [victim, newcomer]
    while newcomer in engine.scheduler.waiting:
        engine.step()
    assert victim not in engine.scheduler.waiting
    engine.run()


def test_a_preempted_sequence_can_be_aborted_while_it_waits() -> None:
    engine = Engine(6)
    engine.generate(text(4, 1), max_tokens=17)
    victim = engine.generate(text(4, 2), max_tokens=17)
    while not victim.num_preemptions:
        engine.step()
    engine.abort(victim)
    assert engine.scheduler.waiting == []
    engine.run()


def test_admission_leaves_room_for_the_running_to_grow() -> None:
    engine = Engine(4)
    engine.generate(text(7, 1), max_tokens=2)
    engine.step()
    waiter = engine.generate(text(7, 2))
    engine.step()
    assert waiter in engine.scheduler.waiting
    engine.run()
    assert waiter.num_preemptions == 0


def test_admission_counts_the_blocks_that_running_prompts_still_need() -> None:
    engine = Engine(10)
    engine.generate(text(24, 1))
    engine.step()
    waiter = engine.generate(text(20, 2))
    step = engine.step()
    assert waiter in engine.scheduler.waiting
    assert not step.preempted
    engine.run()


def test_background_chunks_get_a_share_and_what_the_others_leave() -> None:
    engine = Engine(100)
    background = engine.score(text(40, 1))
    engine.step()
    request = engine.generate(text(64, 2))
    assert counts(engine.step(), background, request) == [4, 12]


def test_background_work_comes_after_the_rest_but_not_never() -> None:
    engine = Engine(100, max_num_seqs=1)
    engine.generate(text(3, 0))
    background = engine.score(text(5, 1))
    order = []
    for seed in range(2, 10):
        order += [chunk.sequence for chunk in engine.step().chunks]
        engine.generate(text(3, seed))
    assert order.index(background) == 4


def test_background_work_takes_only_the_slots_it_can_use() -> None:
    engine = Engine(300, max_num_seqs=4)
    texts = [engine.score(text(200, seed)) for seed in range(3)]
    engine.step()
    assert list(engine.scheduler.running) == texts[:1]
    request = engine.generate(text(8, 9))
    assert counts(engine.step(), request) == [8]
    short = Engine(300, max_num_seqs=4)
    texts = [short.score(text(5, seed)) for seed in range(4)]
    assert counts(short.step(), *texts) == [4, 4, 4, 4]


def test_a_full_queue_refuses_with_the_limit_unless_the_request_was_accepted_before() -> None:
    engine = Engine(10, max_num_queued_reqs=2)
    for seed in range(2):
        engine.generate(text(3, seed))
    with pytest.raises(QueueFullError, match=r"2 requests wait.*max_num_queued_reqs.* is 2") as caught:
        engine.generate(text(3, 5))
    assert caught.value.retry_after >= 1
    part = Sequence("part", text(3, 6), score_from=1)
    engine.scheduler.add(part, accepted=True)
    assert part in engine.scheduler.waiting


@pytest.mark.parametrize("max_tokens", [9, 10])
def test_what_could_never_fit_is_refused_and_what_just_fits_runs(max_tokens: int) -> None:
    engine = Engine(4, 3)
    if max_tokens == 10:
        with pytest.raises(ContextLengthError, match="room for 13 tokens, the whole cache has 12"):
            engine.generate(text(4), max_tokens=max_tokens)
        return
    engine.generate(text(4), max_tokens=max_tokens)
    engine.run()


@pytest.mark.parametrize("tokens", [[], [1]])
def test_a_text_without_a_row_is_refused(tokens: list[int]) -> None:
    with pytest.raises(RequestError, match="nothing to compute"):
        Engine(4).score(tokens)


def test_a_step_must_have_room_for_a_row_of_every_sequence() -> None:
    with pytest.raises(SettingsError, match="max_num_batched_tokens 3 is below max_num_seqs 4"):
        Engine(4, max_num_batched_tokens=3)


def test_growth_past_the_promised_length_is_an_error_not_a_silent_stop() -> None:
    engine = Engine(1, 2)
    request = engine.generate([1], max_tokens=2)
    engine.step()
    request.tokens += [1, 1]
    with pytest.raises(NoFreeBlocksError):
        engine.step()


def test_a_request_can_be_aborted_at_every_point_and_again_when_it_is_gone() -> None:
    for point in range(6):
        engine = Engine(12)
        other = engine.generate(text(9, 1), max_tokens=8)
        request = engine.generate(text(30, 2), max_tokens=4)
        for _ in range(point // 2):
            engine.step()
        if point % 2:
            engine.abort(request)
        else:
            engine.step(during=partial(engine.abort, request))
        assert request not in engine.scheduler.running
        engine.scheduler.abort(request)
        engine.run()
        assert other.num_generated == 8


def test_blocks_of_a_failed_step_are_not_found_again() -> None:
    engine = Engine(20)
    request = engine.generate(text(16))
    step = engine.scheduler.schedule()
    for chunk in step.chunks:
        engine.abort(chunk.sequence)
    assert engine.pool.num_cached == 0
    again = engine.generate(request.tokens)
    engine.run()
    assert again.num_cached == 0


def test_the_checker_names_a_sequence_whose_blocks_are_wrong() -> None:
    engine = Engine(9)
    request = engine.generate(text(30), max_tokens=2)
    engine.step()
    request.num_computed += 1
    with pytest.raises(CacheInvariantError, match="sequence 'g' has 17 tokens"):
        engine.scheduler.check_invariants()
    request.num_computed -= 1
    waiter = engine.generate(text(20, 1))
    waiter.num_computed = 1
    with pytest.raises(CacheInvariantError, match="waits but holds"):
        engine.scheduler.check_invariants()


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_in_a_tiny_pool_ends_with_every_answer_right(seed: int) -> None:
    random = Random(seed)
    engine = Engine(28, 1 + seed, max_num_seqs=6, max_num_batched_tokens=9)
    preempted = hits = 0
    for _ in range(400):
        if random.random() < 0.3 and len(engine.unfinished) < 20:
            tokens = random.choices((0, 1), (9, 1), k=random.randint(2, 8))
            if random.random() < 0.3:
                engine.score(tokens, score_from=random.randint(1, len(tokens) - 1))
            else:
                engine.generate(
                    tokens, max_tokens=random.randint(1, 20) * (1 + seed), priority=random.randint(0, 1)
                )
        if engine.unfinished and random.random() < 0.03:
            engine.step(during=partial(engine.abort, random.choice(engine.unfinished)))
        step = engine.step()
        preempted += len(step.preempted)
        hits += step.prefix_hits
    engine.run()
    assert preempted > 10
    assert hits > 50


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
        self.engine = Engine(
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
        copies=st.integers(1, 4),
    )
    def arrive(
        self, tokens: list[int], max_tokens: int, score_from: int | None, priority: int, copies: int
    ) -> None:
        """Generation where max_tokens is not 0, scoring where score_from is inside the text, or both."""
        sampling = SamplingParams(max_tokens=max_tokens) if max_tokens else None
        if score_from is not None and score_from >= len(tokens):
            score_from = None
        full = len(self.engine.scheduler.waiting)
        for copy in range(copies):
            sequence = Sequence("r", list(tokens), sampling, score_from, priority)
            fits = self.engine.pool.blocks_for(sequence.max_rows) <= self.engine.pool.num_blocks
            if full + copy < 8 and sequence.num_rows and fits:
                self.engine.add(sequence)
            else:
                with pytest.raises((QueueFullError, RequestError)):
                    self.engine.scheduler.add(sequence)

    @rule(steps=st.integers(1, 3))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

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
        for chunk in self.engine.scheduler.schedule().chunks:
            self.engine.abort(chunk.sequence)

    @invariant()
    def books_agree(self) -> None:
        self.engine.scheduler.check_invariants()
        assert {*self.engine.scheduler.running, *self.engine.scheduler.waiting} == {*self.engine.unfinished}

    def teardown(self) -> None:
        """Every request ends, within steps in proportion to the rows there are, and all blocks return."""
        if hasattr(self, "engine"):
            rows = sum(sequence.max_rows for sequence in self.engine.unfinished)
            self.engine.run(limit=2 * rows + 1)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=100, stateful_step_count=30, derandomize=True, deadline=None
)
