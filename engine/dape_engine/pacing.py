"""How much background work a step may take beside tokens a reader waits for, and how long a queue lasts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dape_engine.step import Chunk, pairs

SMOOTHING = 0.1
"""Weight of the newest measurement."""
UNKNOWN_PAIRS = 1 << 18
"""(query, key) pairs of background work before anything has been measured."""
LONGEST_STEP = 0.15
"""Seconds of a step of nothing but background work, where readers come and go."""
READERS_RETURN = 10.0
"""Seconds after which no reader is expected any more, and steps are as large as is best for throughput."""
NO_BOUND = 1 << 62
LONGEST_WAIT = 600
"""Seconds; no client is told to come back later than this."""


class Pace:
    """Learns from the times of past steps.

    Between two steps that decode, background work goes on for as long as one of them takes: as much time for
    readers as for the background.
    """

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        self._seconds_per_pair: float | None = None
        self._recent_seconds = 0.0
        self._recent_rows = 0.0
        self._last_reader = -math.inf

    def background_pairs(self, num_layers: int, now: float) -> tuple[int, int]:
        """Return the (query, key) pairs of background work of a step, with and without decoding sequences.

        With them one layer takes as long as decoding does. Without them all layers take as long as a reader
        may wait who comes in the meantime, at `now` in seconds.
        """
        alone = NO_BOUND
        if self._seconds_per_pair and now - self._last_reader < READERS_RETURN:
            alone = max(1, int(LONGEST_STEP / self._seconds_per_pair))
        if not self._seconds_per_pair or self._decode_seconds is None:
            return UNKNOWN_PAIRS, alone
        return max(1, int(num_layers * self._decode_seconds / self._seconds_per_pair)), alone

    def layers(self, layer_pairs: float) -> int:
        """Return the layers of background work with so many pairs in each that fit between two steps."""
        if self._decode_seconds is None or not self._seconds_per_pair:
            return 1
        return max(1, int(self._decode_seconds / (layer_pairs * self._seconds_per_pair)))

    def observe(self, chunks: Iterable[Chunk], seconds: float, now: float) -> None:
        """Learn from chunks that took so long until now, computed at once and not yet committed."""
        prompt_pairs = decoding = 0
        for chunk in chunks:
            if chunk.sequence.priority <= 0:
                self._last_reader = now
            if chunk.sequence.is_decoding:
                decoding += 1
            else:
                prompt_pairs += pairs(chunk)
        if decoding and not prompt_pairs:
            self._decode_seconds = _blend(self._decode_seconds, seconds)
        elif prompt_pairs and not decoding:
            self.learn(prompt_pairs, seconds)

    def learn(self, prompt_pairs: int, seconds: float) -> None:
        """Learn from so many pairs of prompts that took so long in all layers."""
        self._seconds_per_pair = _blend(self._seconds_per_pair, seconds / prompt_pairs)

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a whole step, whatever it did."""
        # Sums, since a step of a thousand rows tells more than one of four.
        self._recent_rows += rows - SMOOTHING * self._recent_rows
        self._recent_seconds += seconds - SMOOTHING * self._recent_seconds

    def wait(self, rows: int) -> int:
        """Return the seconds after which half of the rows that wait will have been computed, at least 1."""
        seconds = rows / 2 * self._recent_seconds / max(self._recent_rows, 1.0)
        return min(LONGEST_WAIT, max(1, math.ceil(seconds)))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
