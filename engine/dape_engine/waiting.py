"""Sequences that wait for their first admission: bounds, and who is next."""

from __future__ import annotations

from collections import Counter

from dape_engine.errors import QueueFullError
from dape_engine.fairness import FairShares
from dape_engine.sequence import Sequence

MAX_OVERTAKES = 3
"""Admissions out of turn in a row; then comes the sequence that has waited longest."""
RESERVE = 4
"""One part in so many, on top of either bound, is for tenants of whom nothing waits yet."""


class WaitingQueue:
    """A bounded queue that is fair to tenants.

    Next is foreground before background work, then the tenant that has received least, then priority, then
    arrival. A tenant can fill the queue but not the reserve, so that others are still heard.
    """

    def __init__(self, shares: FairShares, *, max_requests: int, max_tokens: int):
        self._shares = shares
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._queue: list[Sequence] = []
        self._tenants: Counter[str] = Counter()
        self._overtakes = 0
        self.num_tokens = 0
        """Rows that the waiting sequences may need in all."""

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._queue

    @property
    def sequences(self) -> list[Sequence]:
        """All of them in the order of arrival."""
        return list(self._queue)

    def check_room(self, sequence: Sequence, others: int) -> None:
        """Refuse a sequence beyond the bounds.

        Args:
            sequence: about to be added.
            others: sequences that wait elsewhere and count too.

        Raises:
            QueueFullError: too many requests or tokens wait.
        """
        heard = self._tenants[sequence.tenant] > 0
        for name, what, waiting, added, limit in (
            ("max_num_queued_reqs", "requests", len(self._queue) + others, 1, self._max_requests),
            ("max_num_queued_tokens", "tokens", self.num_tokens, sequence.max_rows, self._max_tokens),
        ):
            reserve = 0 if heard or waiting == 0 else limit // RESERVE
            # One request alone may be larger than the bound on tokens.
            if waiting and waiting + added > limit + reserve:
                raise QueueFullError(
                    f"{waiting} {what} wait already and this request adds {added}, "
                    f"the limit ({name}) is {limit}"
                )

    def add(self, sequence: Sequence) -> None:
        """Append a new sequence."""
        self._enter(sequence, len(self._queue))

    def put_back(self, sequence: Sequence) -> None:
        """Put a sequence that has given up its place before all others."""
        self._enter(sequence, 0)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is here."""
        self._queue.remove(sequence)
        self._tenants[sequence.tenant] -= 1
        self.num_tokens -= sequence.max_rows
        if not self._tenants[sequence.tenant]:
            del self._tenants[sequence.tenant]

    def admit(self, sequence: Sequence) -> None:
        """Take out the sequence that `next` has named."""
        self._overtakes = 0 if sequence is self._queue[0] else self._overtakes + 1
        self.remove(sequence)

    def next(self, *, background: bool, in_turn: bool) -> Sequence | None:
        """Return the sequence to be admitted next, if any.

        Args:
            background: whether background work, too, may be admitted.
            in_turn: whether the one that has waited longest gets its turn, due or not in the others' eyes.
        """
        if not self._queue:
            return None
        if in_turn and self._overtakes >= MAX_OVERTAKES:
            return self._queue[0]
        first = min(self._queue, key=self._rank)
        return first if background or first.priority <= 0 else None

    def _rank(self, sequence: Sequence) -> tuple[bool, float, int]:
        # The first of equals is the one that came first.
        return sequence.priority > 0, self._shares.received(sequence.tenant), sequence.priority

    def _enter(self, sequence: Sequence, place: int) -> None:
        self._queue.insert(place, sequence)
        self._tenants[sequence.tenant] += 1
        self.num_tokens += sequence.max_rows
