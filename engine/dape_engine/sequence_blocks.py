"""The blocks of sequences: taken from the pool, found again in the prefix cache, filled, and given back.

Which sequence gets how many is the scheduler's affair.
"""

from __future__ import annotations

from collections.abc import Collection

from dape_engine.block_scores import BlockScores
from dape_engine.cache import BlockPool, CacheInvariantError, extend_block_keys
from dape_engine.sequence import Sequence
from dape_engine.step import Chunk


class SequenceBlocks:
    """What is done with the blocks of one sequence at a time."""

    def __init__(self, pool: BlockPool):
        self._pool = pool

    def missing(self, sequence: Sequence, rows: int) -> int:
        """Return how many more blocks a sequence needs for its first `rows` tokens."""
        return self._pool.blocks_for(rows) - len(sequence.blocks)

    def extend(self, sequence: Sequence, rows: int) -> None:
        """Take the blocks that the first `rows` tokens need; as many must be free."""
        sequence.blocks += [self._pool.allocate() for _ in range(self.missing(sequence, rows))]

    def reset(self, sequence: Sequence) -> None:
        """Give all blocks of a sequence back; it has to be computed again."""
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.flight = None

    def reuse(self, sequence: Sequence) -> int:
        """Take the next blocks from the prefix cache; return the hits to be counted, in tokens.

        Running sequences look again, since another one may have computed their next block.
        What a sequence finds again after a preemption is no hit.
        """
        self._recall_scores(sequence)
        wanted = self.reusable(sequence)
        if not wanted:
            return 0
        found = self._pool.match_prefix(self.key(sequence, index) for index in wanted)
        tokens = len(found) * self._pool.block_size
        sequence.blocks += found
        sequence.num_computed += tokens
        sequence.num_cached += tokens
        return tokens if sequence.num_preemptions == 0 else 0

    def reusable(self, sequence: Sequence) -> range:
        """Return which of its next blocks need not be computed by the sequence itself."""
        size = self._pool.block_size
        first = len(sequence.blocks)
        return range(first, sequence.first_needed_row // size if first * size == sequence.num_computed else 0)

    def key(self, sequence: Sequence, index: int) -> bytes:
        """Return the prefix cache key of a block, b"" where it is not full with the tokens known."""
        size = self._pool.block_size
        if (index + 1) * size > len(sequence.tokens):
            return b""
        extend_block_keys(sequence.block_keys, sequence.tokens, size, index + 1, sequence.cache_salt)
        return sequence.block_keys[index]

    def advance(self, sequence: Sequence, start: int, end: int) -> None:
        """Record that rows of known tokens are in the cache and make the blocks they filled findable."""
        size = self._pool.block_size
        sequence.num_computed = end
        for index in range(start // size, end // size):
            self._pool.register(sequence.blocks[index], self.key(sequence, index))

    def propose(self, chunk: Chunk, tokens: list[int]) -> Chunk:
        """Add the rows of proposed tokens to the last chunk of a sequence, as far as free blocks go."""
        room = (len(chunk.sequence.blocks) + self._pool.num_free) * self._pool.block_size - chunk.end
        proposed = tuple(tokens[:room])
        count = chunk.count + len(proposed)
        self.extend(chunk.sequence, chunk.start + count)
        return Chunk(chunk.sequence, chunk.start, count, proposed)

    def settle(self, chunk: Chunk) -> None:
        """Keep the rows of proposed tokens that a running sequence has taken, and free the others' blocks."""
        sequence = chunk.sequence
        self.advance(sequence, chunk.end, min(chunk.start + chunk.count, sequence.num_rows - 1))
        needed = self._pool.blocks_for(sequence.num_computed)
        self._pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]

    def keep_scores(self, sequence: Sequence) -> None:
        """Keep the log-probabilities of a running sequence with the blocks that are full of known ones."""
        if sequence.score_from is None:
            return
        size = self._pool.block_size
        known = sequence.score_from + sequence.num_scored
        while (end := (sequence.num_blocks_kept + 1) * size) <= min(known, sequence.num_computed):
            # The first token of all has no log-probability.
            first = max(1, end - size)
            if first >= sequence.score_from:
                scored = sequence.scored[first - sequence.score_from : end - sequence.score_from]
                key = self.key(sequence, sequence.num_blocks_kept)
                self._pool.keep_scores(key, BlockScores(scored, sequence.top_logprobs))
            sequence.num_blocks_kept += 1

    def check(self, holders: Collection[Sequence]) -> None:
        """Check that blocks are held by these sequences only, as many as they need, each once.

        Raises:
            CacheInvariantError: with the facts that disagree.
        """
        self._pool.check_invariants(sequence.blocks for sequence in holders)
        for sequence in holders:
            twice = len(set(sequence.blocks)) < len(sequence.blocks)
            if twice or self.missing(sequence, sequence.num_computed) > 0:
                raise CacheInvariantError(
                    f"sequence {sequence.request_id!r} has {sequence.num_computed} tokens in the blocks "
                    f"{sequence.blocks} of {self._pool.block_size}"
                )

    def _recall_scores(self, sequence: Sequence) -> None:
        """Take the next log-probabilities that are kept with cached blocks."""
        if sequence.score_from is None:
            return
        size = self._pool.block_size
        while (place := sequence.score_from + sequence.num_scored) < sequence.prompt_length:
            kept = self._pool.scores(self.key(sequence, place // size))
            if kept is None or kept.top < sequence.top_logprobs:
                return
            end = min((place // size + 1) * size, sequence.prompt_length)
            sequence.scored += kept.entries(sequence.tokens[place:end], sequence.top_logprobs)
