"""A scheduler with a simulated model that checks every step, for tests of the scheduler alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from dape_engine.cache import BlockPool, extend_block_keys
from dape_engine.request import SamplingParams, TokenLogprob
from dape_engine.scheduler import Scheduler
from dape_engine.sequence import Sequence
from dape_engine.speculation import PromptLookup, SpeculativeConfig, Speculator, verified
from dape_engine.step import Chunk, Step


def next_token(prefix: tuple[int, ...]) -> int:
    """Stand for a model: the next token depends on every token before it, and only on them."""
    return (sum((place + 1) * token for place, token in enumerate(prefix)) + len(prefix)) % 3


class HalfRight(PromptLookup):
    """Proposes some tokens that the simulated model gives, then some that it may not give, all as certain."""

    def __init__(self, seed: int):
        super().__init__(SpeculativeConfig())
        self._random = Random(seed)

    def propose(self, tokens: list[int]) -> tuple[list[int], list[float]]:
        proposed: list[int] = []
        for _ in range(self._random.randrange(5)):
            proposed.append(next_token((*tokens, *proposed)))
        proposed += self._random.choices(range(3), k=self._random.randrange(3))
        return proposed, [1.0] * len(proposed)


def pairs(chunk: Chunk) -> int:
    return sum(position + 1 for position in range(chunk.start, chunk.start + chunk.count))


class SimulatedEngine:
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
        max_num_queued_tokens: int = 1 << 22,
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
            max_num_queued_tokens=max_num_queued_tokens,
            max_prefill_pairs=max_prefill_pairs,
        )
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.unfinished: list[Sequence] = []
        self.speculator = Speculator(self.scheduler.blocks, max_num_batched_tokens)
        self.rows_scored = self.accepted = 0
        self.admitted: list[Sequence] = []

    def generate(
        self,
        tokens: list[int],
        max_tokens: int = 1,
        priority: int = 0,
        tenant: str = "",
        lookup: PromptLookup | None = None,
    ) -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens)
        return self.add(
            Sequence("g", list(tokens), sampling, priority=priority, tenant=tenant, lookup=lookup)
        )

    def score(
        self, tokens: list[int], score_from: int = 1, priority: int = 1, tenant: str = "", top: int = 0
    ) -> Sequence:
        return self.add(
            Sequence("s", list(tokens), None, score_from, priority=priority, tenant=tenant, top_logprobs=top)
        )

    def add(self, sequence: Sequence) -> Sequence:
        self.scheduler.add(sequence)
        self.unfinished.append(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.unfinished.remove(sequence)

    def step(
        self, during: Callable[[], None] = lambda: None, background_pairs: tuple[int, int] | None = None
    ) -> Step:
        """Run one step as the real engine does; `during` happens before the model has run."""
        computed = {sequence: sequence.num_computed for sequence in self.scheduler.running}
        decoding = [sequence for sequence in self.scheduler.running if sequence.is_decoding]
        step = self.scheduler.schedule(background_pairs)
        step = replace(step, chunks=self.speculator.extend(step.chunks))
        self.scheduler.check_invariants()
        self.check(step, computed, decoding)
        during()
        for chunk in step.chunks:
            self.compute(chunk)
        self.scheduler.commit(step.chunks)
        for chunk in step.chunks:
            if chunk.sequence in self.scheduler.running:
                self.advance(chunk)
        self.scheduler.check_invariants()
        return step

    def check(self, step: Step, computed: dict[Sequence, int], decoding: list[Sequence]) -> None:
        """Check what is promised of every single step."""
        running = list(self.scheduler.running)
        for sequence in step.yielded:
            if sequence in self.admitted:
                self.admitted.remove(sequence)
            assert any(other.tenant == sequence.tenant for other in running), "each keeps one running"
        assert len(running) <= self.max_num_seqs
        self.check_order(running)
        chunks = {chunk.sequence: chunk for chunk in step.chunks}
        assert len(chunks) == len(step.chunks)
        assert sum(chunk.count for chunk in step.chunks) <= self.budget
        gone = [*step.preempted, *step.yielded]
        assert all(sequence in chunks or sequence in gone for sequence in decoding)
        if self.unfinished:
            assert step.chunks[0].sequence is running[0], "the first admitted always goes on"
        for chunk in step.chunks:
            before = computed.get(chunk.sequence, 0)
            taken = chunk.start - before
            assert taken >= 0
            assert taken % self.pool.block_size == 0
            assert not taken or chunk.start <= chunk.sequence.first_needed_row
            assert chunk.count >= 1
            assert chunk.end <= chunk.sequence.num_rows
            assert chunk.start + chunk.count <= chunk.sequence.max_rows
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
            known = len(sequence.block_keys)
            extend_block_keys(keys, sequence.tokens, self.pool.block_size, known, sequence.cache_salt)
            assert sequence.block_keys == keys
            assert len(keys) <= len(sequence.tokens) // self.pool.block_size
            assert sequence.num_cached <= sequence.num_computed

    def compute(self, chunk: Chunk) -> None:
        sequence, size = chunk.sequence, self.pool.block_size
        known = (*sequence.tokens[: chunk.end], *chunk.proposed)
        for position in range(chunk.start, chunk.start + chunk.count):
            block = sequence.blocks[position // size]
            holders = [other for other in self.scheduler.running if block in other.blocks]
            assert holders in ([sequence], []), "a block that is written is shared"
            self.memory[block, position % size] = known[: position + 1]
        end = chunk.start + chunk.count
        for position in range(end):
            slot = sequence.blocks[position // size], position % size
            assert self.memory[slot] == known[: position + 1]

    def advance(self, chunk: Chunk) -> None:
        sequence, end = chunk.sequence, chunk.end
        if sequence.score_from is not None:
            first = max(chunk.start, sequence.score_from + sequence.num_scored - 1)
            for row in range(first, min(end, sequence.prompt_length - 1)):
                sequence.scored.append(self.scored_token(sequence, row + 1))
                self.rows_scored += 1
            self.scheduler.blocks.keep_scores(sequence)
        if end < sequence.num_rows:
            return
        if sequence.sampling is not None:
            self.draw(chunk)
        if sequence.sampling is None or sequence.num_generated == sequence.sampling.max_tokens:
            self.scheduler.finish(sequence)
            self.unfinished.remove(sequence)
            self.check_answer(sequence)

    def draw(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        read = [(*sequence.tokens, *chunk.proposed[:count]) for count in range(len(chunk.proposed) + 1)]
        drawn = verified([TokenLogprob(next_token(prefix), 0.0) for prefix in read], chunk.proposed)
        self.accepted += len(drawn) - 1
        sequence.tokens += [token.token_id for token in drawn]
        if chunk.proposed:
            self.scheduler.blocks.settle(chunk)
        assert len(sequence.blocks) == self.pool.blocks_for(sequence.num_computed)

    def check_answer(self, sequence: Sequence) -> None:
        expected = sequence.tokens[: sequence.prompt_length]
        for _ in range(sequence.num_generated):
            expected.append(next_token(tuple(expected)))
        assert sequence.tokens == expected
        if sequence.score_from is not None:
            places = range(sequence.score_from, sequence.prompt_length)
            assert sequence.scored == [self.scored_token(sequence, place) for place in places]

    def scored_token(self, sequence: Sequence, place: int) -> TokenLogprob:
        """Stand for a log-probability: it, too, depends on every token up to its own."""
        prefix = tuple(sequence.tokens[: place + 1])
        value = float(sum((place + 1) * token for place, token in enumerate(prefix)) + 100 * place)
        top = tuple((token, value + token) for token in range(sequence.top_logprobs))
        return TokenLogprob(sequence.tokens[place], value, top, rank=1 + int(value) % 1000)

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
