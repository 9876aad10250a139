"""Which rows of which sequences the next step computes: admission, chunks, preemption, cancellation.

Each step has one budget of rows. Every decoding sequence gets its row first; prefill and scoring
chunks share the rest. The scheduler owns the blocks of the sequences given to it; it never looks at
tensors and knows no time. One step after the other:

    step = schedule()      then compute step.chunks
    commit(step.chunks)    or, where the computation failed, discard() their sequences
    then, for each chunk whose sequence is still in `running`: append to `scored` and blocks.keep_scores(),
    append the new tokens to `tokens` and blocks.settle() those proposed, or finish() the sequence

Calls must not overlap (the engine's lock sees to that), but add() and finish() may come between any two.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, KeysView

from dape_engine.cache import BlockPool, CacheInvariantError
from dape_engine.errors import ContextLengthError, RequestError, SettingsError
from dape_engine.fairness import FairShares, cost
from dape_engine.sequence import Sequence
from dape_engine.sequence_blocks import SequenceBlocks
from dape_engine.step import Budget, Chunk, Step
from dape_engine.waiting import WaitingQueue

OLDEST_SHARE = 4
"""One part in so many of a step's prefill work is for the prefill that was admitted first."""


class Scheduler:
    """Continuous batching with chunked prefill, prefix sharing and preemption by recompute.

    Waiting sequences are admitted in the order of `WaitingQueue`. One is admitted when a slot is free and
    the free blocks hold all tokens known today of it and of those running, plus one block of growth
    for each running one; so only generated text can outgrow the pool. Then the sequence admitted last
    gives up its blocks and goes before all that wait. A sequence whose tenant has nothing running makes
    its own room: the latest of the tenant with most running ones, not the first admitted of all, goes back
    to wait, its prefix still in the cache. Admitted sequences thus keep one order, of which those running
    are the head, and the first of them always gets a row and its blocks: by induction every sequence ends.

    Prefills take rows foreground first, then by what their tenants have received, by priority, and the
    fewest remaining first, so that a short prompt passes a long one; a fixed share for the one admitted
    first keeps the long one going. While anything decodes, all prefill chunks of a step together have at
    most `max_prefill_pairs` (query, key) pairs, but the first admitted at least one block of rows.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_queued_reqs: int,
        max_num_queued_tokens: int = 1 << 22,
        max_prefill_pairs: int = 1 << 20,
    ):
        """Raise SettingsError where a step could not hold one row of each running sequence."""
        if max_num_batched_tokens < max_num_seqs:
            raise SettingsError(
                f"max_num_batched_tokens {max_num_batched_tokens} is below max_num_seqs {max_num_seqs}, "
                "so that a step could not advance every running sequence",
                param="max_num_batched_tokens",
            )
        self.blocks = SequenceBlocks(pool)
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_prefill_pairs = max_prefill_pairs
        self._running: dict[Sequence, None] = {}
        self._preempted: deque[Sequence] = deque()
        self._shares = FairShares()
        self._queue = WaitingQueue(
            self._shares, max_requests=max_num_queued_reqs, max_tokens=max_num_queued_tokens
        )
        self._tenants: Counter[str] = Counter()

    @property
    def running(self) -> KeysView[Sequence]:
        """Admitted sequences in the order of admission: a live view, quick to search."""
        return self._running.keys()

    @property
    def waiting(self) -> list[Sequence]:
        """Preempted sequences in the order of their admission, then new ones in that of arrival."""
        return [*self._preempted, *self._queue.sequences]

    @property
    def waiting_tokens(self) -> int:
        """Rows that waiting sequences may need in all."""
        return self._queue.num_tokens + sum(sequence.max_rows for sequence in self._preempted)

    def add(self, sequence: Sequence, *, accepted: bool = False) -> None:
        """Let a new sequence wait for its admission.

        Args:
            sequence: nothing of it computed yet.
            accepted: it is a further part of a request accepted before, so a full queue does not matter.

        Raises:
            QueueFullError: too many requests or tokens wait.
            RequestError: there is no row to compute.
            ContextLengthError: it would not fit the cache even if it ran alone.
        """
        if not accepted:
            self._queue.check_room(sequence, len(self._preempted))
        if sequence.num_rows < 1:
            raise RequestError(f"{len(sequence.tokens)} tokens leave nothing to compute", code="too_short")
        needed = self._pool.blocks_for(sequence.max_rows)
        if needed > self._pool.num_blocks:
            raise ContextLengthError(
                f"prompt and completion need room for {sequence.max_rows} tokens, the whole cache has "
                f"{self._pool.num_blocks * self._pool.block_size}"
            )
        if sequence.tenant not in self._tenants:
            self._shares.join(sequence.tenant, self._tenants)
        self._tenants[sequence.tenant] += 1
        self._queue.add(sequence)

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
        else:
            return
        sequence.flight = None
        self._tenants[sequence.tenant] -= 1
        if not self._tenants[sequence.tenant]:
            del self._tenants[sequence.tenant]

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence whose computation has failed, and what it has left in the prefix cache."""
        self._pool.forget(sequence.blocks)
        self.finish(sequence)

    def schedule(self, background_pairs: tuple[int, int] | None = None) -> Step:
        """Admit what fits and choose the rows of the next step; empty only if nothing runs or waits.

        Args:
            background_pairs: (query, key) pairs of background work beside decoding sequences, and without
                them; None sets no bound of its own.
        """
        hits = sum(self.blocks.reuse(sequence) for sequence in self._running)
        yielded: list[Sequence] = []
        admitted, admitted_hits = self._admit(yielded)
        chunks, preempted = self._allocate(self._plan(background_pairs))
        return Step(chunks, preempted, yielded, admitted, hits + admitted_hits)

    def ground(self, chunks: Iterable[Chunk]) -> None:
        """Forget that chunks are on their way; their rows are planned anew."""
        for chunk in chunks:
            if chunk.sequence.flight is chunk:
                chunk.sequence.flight = None

    def commit(self, chunks: Iterable[Chunk]) -> None:
        """Record that the rows of chunks are in the cache and make the blocks they filled findable.

        Chunks of sequences that were finished since schedule() are ignored.
        """
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.flight = None
            self._shares.charge(sequence.tenant, cost(chunk.start, chunk.count))
            if sequence not in self._running:
                continue
            self.blocks.advance(sequence, chunk.start, chunk.end)

    def check_invariants(self) -> None:
        """Check that blocks are held by running sequences only, as many as they need, each once.

        Raises:
            CacheInvariantError: with the facts that disagree.
        """
        self.blocks.check(self.running)
        for sequence in self.waiting:
            if sequence.blocks or sequence.num_computed:
                raise CacheInvariantError(f"sequence {sequence.request_id!r} waits but holds blocks")

    def _admit(self, yielded: list[Sequence]) -> tuple[int, int]:
        """Admit sequences; return their prompt tokens and how many the prefix cache had."""
        queries = hits = 0
        while (sequence := self._next_waiting()) is not None:
            if not self._has_slot and not self._yielding_to(sequence):
                break
            sequence.num_cached = 0
            found = self.blocks.reuse(sequence)
            if not self._fits(sequence) and not self._make_room(sequence, yielded):
                self.blocks.reset(sequence)
                break
            self._leave_queue(sequence)
            self._running[sequence] = None
            # A slot counts as a row, so that tenants who arrive together are admitted in turn.
            self._shares.charge(sequence.tenant, 1.0)
            hits += found
            if sequence.num_preemptions == 0:
                queries += sequence.prompt_length
        return queries, hits

    @property
    def _has_slot(self) -> bool:
        return len(self._running) < self._max_num_seqs

    def _fits(self, sequence: Sequence) -> bool:
        """Return whether a slot and blocks for the tokens known today are free."""
        missing = self.blocks.missing(sequence, sequence.num_rows)
        return self._has_slot and self._spare_blocks() >= missing + len(self._running)

    def _make_room(self, newcomer: Sequence, yielded: list[Sequence]) -> bool:
        """Send sequences back to the queue until one fits; return whether it does."""
        while not self._fits(newcomer) and (able := self._yielding_to(newcomer)):
            del self._running[able[-1]]
            self.blocks.reset(able[-1])
            able[-1].num_preemptions += 1
            self._queue.put_back(able[-1])
            yielded.append(able[-1])
        return self._fits(newcomer)

    def _yielding_to(self, newcomer: Sequence) -> list[Sequence]:
        """Return who gives way to a sequence, in the order of admission, if nothing runs of its tenant.

        They are of the tenant with most running sequences, keep one of them running and the first admitted
        of all as well. Foreground work never gives way to background work.
        """
        running = Counter(sequence.tenant for sequence in self._running)
        if running[newcomer.tenant] or newcomer.num_preemptions:
            return []
        able = [
            sequence
            for place, sequence in enumerate(self._running)
            if place and running[sequence.tenant] > 1 and (sequence.priority > 0 or newcomer.priority <= 0)
        ]
        most = max((running[sequence.tenant] for sequence in able), default=0)
        return [sequence for sequence in able if running[sequence.tenant] == most]

    def _next_waiting(self) -> Sequence | None:
        """Return the sequence to be admitted next, if any.

        Background work that could not get rows soon would only keep a slot from the others.
        """
        if self._preempted:
            return self._preempted[0]
        backlog = sum(sequence.num_remaining for sequence in self._running)
        return self._queue.next(background=backlog < self._max_num_batched_tokens, in_turn=self._has_slot)

    def _leave_queue(self, sequence: Sequence) -> None:
        if self._preempted:
            self._preempted.popleft()
        else:
            self._queue.admit(sequence)

    def _spare_blocks(self) -> int:
        """Return the free blocks that running sequences do not need for the tokens they have today."""
        return self._pool.num_free - sum(self.blocks.missing(each, each.num_rows) for each in self._running)

    def _plan(self, background_pairs: tuple[int, int] | None) -> dict[Sequence, int]:
        """Share out the rows of a step."""
        plan = {sequence: 1 for sequence in self._running if sequence.is_decoding}
        prefills = [s for s in self._running if not s.is_decoding and s.flight is None]
        rows = self._max_num_batched_tokens - len(plan)
        unlimited = rows * self._pool.num_blocks * self._pool.block_size
        budget = Budget(rows, unlimited, unlimited)
        if plan:
            budget.pairs = budget.background_pairs = self._max_prefill_pairs
        if background_pairs is not None:
            budget.background_pairs = background_pairs[0 if plan else 1]
        turns = [(sequence, OLDEST_SHARE, self._least_rows(sequence)) for sequence in prefills[:1]]
        prefills.sort(key=self._rank)
        turns += [(sequence, 1, 0) for sequence in prefills]
        computed_by: dict[bytes, Sequence] = {}
        for sequence, share, least in turns:
            key = self.blocks.key(sequence, sequence.num_computed // self._pool.block_size)
            # A block that another one computes in this step is in the cache in the next.
            if computed_by.get(key, sequence) is not sequence and self.blocks.reusable(sequence):
                continue
            planned = plan.get(sequence, 0)
            start, wanted = sequence.num_computed + planned, sequence.num_remaining - planned
            if count := budget.grant(start, wanted, sequence.priority > 0, share, least):
                computed_by.setdefault(key, sequence)
                plan[sequence] = planned + count
        return plan

    def _least_rows(self, sequence: Sequence) -> int:
        """Return the rows that the prefill admitted first gets in any case: readers wait for them."""
        size = self._pool.block_size
        return size if sequence.priority <= 0 else -(-size // 4)

    def _rank(self, sequence: Sequence) -> tuple[bool, float, int, int]:
        received = self._shares.received(sequence.tenant)
        return sequence.priority > 0, received, sequence.priority, sequence.num_remaining

    def _allocate(self, plan: dict[Sequence, int]) -> tuple[list[Chunk], list[Sequence]]:
        """Find blocks for the planned rows, first admitted first; return the chunks and the preempted.

        Only sequences admitted later than the one served are preempted, or else that one itself.
        """
        chunks: list[Chunk] = []
        preempted: list[Sequence] = []
        for sequence in list(self._running):
            count = plan.get(sequence, 0)
            rows = sequence.num_computed + count
            missing = self.blocks.missing(sequence, rows)
            while sequence in self._running and missing > self._pool.num_free and len(self._running) > 1:
                preempted.append(self._preempt_last())
            if count and sequence in self._running:
                self.blocks.extend(sequence, rows)
                chunks.append(Chunk(sequence, sequence.num_computed, count))
        return chunks, preempted

    def _preempt_last(self) -> Sequence:
        sequence, _ = self._running.popitem()
        self.blocks.reset(sequence)
        sequence.num_preemptions += 1
        self._preempted.appendleft(sequence)
        return sequence
