"""Which rows of which sequences the next step computes: admission, chunks, preemption, cancellation.

Each step has one budget of rows. Every decoding sequence gets its row first; prefill and scoring
chunks share the rest. The scheduler owns the blocks of the sequences given to it; it never looks at
tensors and knows no time. One step after the other:

    step = schedule()    then compute step.chunks
    commit(step)         or, where the computation failed, finish() for its sequences
    then, for each chunk whose sequence is still in `running`: raise `num_scored`, append the new token
    to `tokens`, or finish() the sequence

Calls must not overlap (the engine's lock sees to that), but add() and finish() may come between any two.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import KeysView
from dataclasses import dataclass

from dape_engine.cache import BlockPool, CacheInvariantError, extend_block_keys
from dape_engine.errors import ContextLengthError, QueueFullError, RequestError, SettingsError
from dape_engine.sequence import Sequence

OLDEST_SHARE = 4
"""One part in so many of a step's prefill work is for the prefill that was admitted first."""
MAX_OVERTAKES = 3
"""Admissions by priority in a row; then comes the sequence that has waited longest."""
RETRY_AFTER = 1
"""Seconds after which a refused client may try again."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows start to start + count of a sequence; `sequence.blocks` has room for them."""

    sequence: Sequence
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Step:
    """The work of one step, sequences in the order of their admission, and what led to it."""

    chunks: list[Chunk]
    preempted: list[Sequence]
    prefix_queries: int
    """Prompt tokens of the sequences admitted for the first time in this step."""
    prefix_hits: int
    """Prompt tokens that never preempted sequences took from the prefix cache in this step."""


@dataclass(slots=True)
class _Budget:
    """Rows and attention pairs that are left for the prefill chunks of a step."""

    rows: int
    pairs: int

    def grant(self, start: int, wanted: int, share: int = 1, least: int = 0) -> int:
        """Take up to `wanted` rows from position `start` on, out of one part in `share`.

        Row p attends to p + 1 keys. At least `least` rows are taken where rows are left and wanted,
        whatever pairs they cost.
        """
        odd = 2 * start + 1
        affordable = (math.isqrt(odd * odd + 8 * (self.pairs // share)) - odd) // 2
        count = max(min(self.rows // share, affordable), least)
        count = min(count, wanted, self.rows)
        self.rows -= count
        self.pairs = max(0, self.pairs - count * (odd + count) // 2)
        return count


class Scheduler:
    """Continuous batching with chunked prefill, prefix sharing and preemption by recompute.

    Waiting sequences are admitted by priority, then arrival. One is admitted when a slot is free and
    the free blocks hold all tokens known today of it and of those running, plus one block of growth
    for each running one; so only generated text can outgrow the pool. Then the sequence admitted last
    gives up its blocks and goes before all that wait. Admitted sequences thus keep one order for ever,
    of which those running are the head, and the first of them always gets a row and its blocks:
    by induction every sequence ends.

    Prefills take rows by priority, then the fewest remaining first, so that a short prompt passes a
    long one; a fixed share for the one admitted first keeps the long one going. While anything decodes,
    all prefill chunks of a step together have at most `max_prefill_pairs` (query, key) pairs, but the
    first admitted at least one block of rows.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_queued_reqs: int,
        max_prefill_pairs: int = 1 << 20,
    ):
        """Raise SettingsError where a step could not hold one row of each running sequence."""
        if max_num_batched_tokens < max_num_seqs:
            raise SettingsError(
                f"max_num_batched_tokens {max_num_batched_tokens} is below max_num_seqs {max_num_seqs}, "
                "so that a step could not advance every running sequence",
                param="max_num_batched_tokens",
            )
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_queued_reqs = max_num_queued_reqs
        self._max_prefill_pairs = max_prefill_pairs
        self._running: dict[Sequence, None] = {}
        self._preempted: deque[Sequence] = deque()
        self._queue: list[Sequence] = []
        self._overtakes = 0

    @property
    def running(self) -> KeysView[Sequence]:
        """Admitted sequences in the order of admission: a live view, quick to search."""
        return self._running.keys()

    @property
    def waiting(self) -> list[Sequence]:
        """Preempted sequences in the order of their admission, then new ones in that of arrival."""
        return [*self._preempted, *self._queue]

    def add(self, sequence: Sequence, *, accepted: bool = False) -> None:
        """Let a new sequence wait for its admission.

        Args:
            sequence: nothing of it computed yet.
            accepted: it is a further part of a request accepted before, so a full queue does not matter.

        Raises:
            QueueFullError: too many wait.
            RequestError: there is no row to compute.
            ContextLengthError: it would not fit the cache even if it ran alone.
        """
        waiting = len(self._preempted) + len(self._queue)
        if waiting >= self._max_num_queued_reqs and not accepted:
            raise QueueFullError(
                f"{waiting} requests wait already, the limit (max_num_queued_reqs) is "
                f"{self._max_num_queued_reqs}",
                retry_after=RETRY_AFTER,
            )
        if sequence.num_rows < 1:
            raise RequestError(f"{len(sequence.tokens)} tokens leave nothing to compute", code="too_short")
        needed = self._pool.blocks_for(sequence.max_rows)
        if needed > self._pool.num_blocks:
            raise ContextLengthError(
                f"prompt and completion need room for {sequence.max_rows} tokens, the whole cache has "
                f"{self._pool.num_blocks * self._pool.block_size}"
            )
        self._queue.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, done or aborted, wherever it is; one that is not here is ignored.

        Its blocks are free at once, and full ones stay findable. Between schedule() and commit() that is
        safe: nobody is given the blocks before the next schedule(), and the sequence itself stays as it
        is, so that the step under way may go on reading and writing there.
        """
        if sequence in self._running:
            del self._running[sequence]
            self._pool.release(sequence.blocks)
        elif sequence in self._preempted:
            self._preempted.remove(sequence)
        elif sequence in self._queue:
            self._queue.remove(sequence)

    def schedule(self) -> Step:
        """Admit what fits and choose the rows of the next step; empty only if nothing runs or waits."""
        hits = sum(self._reuse(sequence) for sequence in self._running)
        admitted, admitted_hits = self._admit()
        chunks, preempted = self._allocate(self._plan())
        return Step(chunks, preempted, admitted, hits + admitted_hits)

    def commit(self, step: Step) -> None:
        """Record that the rows of a step are in the cache and make the blocks they filled findable.

        Chunks of sequences that were finished since schedule() are ignored.
        """
        size = self._pool.block_size
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence not in self._running:
                continue
            sequence.num_computed = chunk.start + chunk.count
            for index in range(chunk.start // size, sequence.num_computed // size):
                self._pool.register(sequence.blocks[index], self._key(sequence, index))

    def check_invariants(self) -> None:
        """Check that blocks are held by running sequences only, as many as they need, each once.

        Raises:
            CacheInvariantError: with the facts that disagree.
        """
        self._pool.check_invariants(sequence.blocks for sequence in self._running)
        for sequence in self._running:
            blocks = len(sequence.blocks)
            needed = self._pool.blocks_for(sequence.num_computed)
            if blocks < needed or len(set(sequence.blocks)) < blocks:
                raise CacheInvariantError(
                    f"sequence {sequence.request_id!r} has {sequence.num_computed} tokens in the blocks "
                    f"{sequence.blocks} of {self._pool.block_size}"
                )
        for sequence in self.waiting:
            if sequence.blocks or sequence.num_computed:
                raise CacheInvariantError(f"sequence {sequence.request_id!r} waits but holds blocks")

    def _admit(self) -> tuple[int, int]:
        """Admit sequences; return their prompt tokens and how many the prefix cache had."""
        queries = hits = 0
        while len(self._running) < self._max_num_seqs:
            sequence = self._next_waiting()
            if sequence is None:
                break
            sequence.num_cached = 0
            found = self._reuse(sequence)
            if self._spare_blocks() < self._missing_blocks(sequence) + len(self._running):
                self._reset(sequence)
                break
            self._leave_queue(sequence)
            self._running[sequence] = None
            hits += found
            if sequence.num_preemptions == 0:
                queries += sequence.prompt_length
        return queries, hits

    def _next_waiting(self) -> Sequence | None:
        """Return the sequence to be admitted next, if any.

        Background work that could not get rows soon would only keep a slot from the others.
        """
        if self._preempted:
            return self._preempted[0]
        if not self._queue:
            return None
        if self._overtakes >= MAX_OVERTAKES:
            return self._queue[0]
        first = min(self._queue, key=lambda sequence: sequence.priority)
        backlog = sum(sequence.num_remaining for sequence in self._running)
        return first if first.priority <= 0 or backlog < self._max_num_batched_tokens else None

    def _leave_queue(self, sequence: Sequence) -> None:
        if self._preempted:
            self._preempted.popleft()
            return
        self._overtakes = 0 if sequence is self._queue[0] else self._overtakes + 1
        self._queue.remove(sequence)

    def _spare_blocks(self) -> int:
        """Return the free blocks that running sequences do not need for the tokens they have today."""
        return self._pool.num_free - sum(self._missing_blocks(sequence) for sequence in self._running)

    def _missing_blocks(self, sequence: Sequence) -> int:
        return self._pool.blocks_for(sequence.num_rows) - len(sequence.blocks)

    def _reuse(self, sequence: Sequence) -> int:
        """Take the next blocks from the prefix cache; return the hits to be counted, in tokens.

        Running sequences look again, since another one may have computed their next block.
        What a sequence finds again after a preemption is no hit.
        """
        wanted = self._reusable_blocks(sequence)
        if not wanted:
            return 0
        found = self._pool.match_prefix(self._key(sequence, index) for index in wanted)
        tokens = len(found) * self._pool.block_size
        sequence.blocks += found
        sequence.num_computed += tokens
        sequence.num_cached += tokens
        return tokens if sequence.num_preemptions == 0 else 0

    def _reusable_blocks(self, sequence: Sequence) -> range:
        """Return which of its next blocks need not be computed by the sequence itself."""
        size = self._pool.block_size
        first = len(sequence.blocks)
        return range(first, sequence.first_needed_row // size if first * size == sequence.num_computed else 0)

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Return the prefix cache key of a block, b"" where it is not full with the tokens known."""
        size = self._pool.block_size
        if (index + 1) * size > len(sequence.tokens):
            return b""
        extend_block_keys(sequence.block_keys, sequence.tokens, size, index + 1)
        return sequence.block_keys[index]

    def _plan(self) -> dict[Sequence, int]:
        """Share out the rows of a step."""
        plan = {sequence: 1 for sequence in self._running if sequence.is_decoding}
        prefills = [sequence for sequence in self._running if not sequence.is_decoding]
        rows = self._max_num_batched_tokens - len(plan)
        unlimited = rows * self._pool.num_blocks * self._pool.block_size
        budget = _Budget(rows, self._max_prefill_pairs if plan else unlimited)
        turns = [(sequence, OLDEST_SHARE, self._pool.block_size) for sequence in prefills[:1]]
        prefills.sort(key=lambda sequence: (sequence.priority, sequence.num_remaining))
        turns += [(sequence, 1, 0) for sequence in prefills]
        computed_by: dict[bytes, Sequence] = {}
        for sequence, share, least in turns:
            key = self._key(sequence, sequence.num_computed // self._pool.block_size)
            # A block that another one computes in this step is in the cache in the next.
            if computed_by.get(key, sequence) is not sequence and self._reusable_blocks(sequence):
                continue
            planned = plan.get(sequence, 0)
            start, wanted = sequence.num_computed + planned, sequence.num_remaining - planned
            if count := budget.grant(start, wanted, share, least):
                computed_by.setdefault(key, sequence)
                plan[sequence] = planned + count
        return plan

    def _allocate(self, plan: dict[Sequence, int]) -> tuple[list[Chunk], list[Sequence]]:
        """Find blocks for the planned rows, first admitted first; return the chunks and the preempted.

        Only sequences admitted later than the one served are preempted, or else that one itself.
        """
        chunks: list[Chunk] = []
        preempted: list[Sequence] = []
        for sequence in list(self._running):
            count = plan.get(sequence, 0)
            missing = self._pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
            while sequence in self._running and missing > self._pool.num_free and len(self._running) > 1:
                preempted.append(self._preempt_last())
            if count and sequence in self._running:
                sequence.blocks += [self._pool.allocate() for _ in range(missing)]
                chunks.append(Chunk(sequence, sequence.num_computed, count))
        return chunks, preempted

    def _preempt_last(self) -> Sequence:
        sequence, _ = self._running.popitem()
        self._reset(sequence)
        sequence.num_preemptions += 1
        self._preempted.appendleft(sequence)
        return sequence

    def _reset(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
