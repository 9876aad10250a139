"""Interleaved timing: on a shared machine two things can be compared only if they ran side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

# A sample repeats its work until it has taken this long, so that the clocks' resolution does not matter.
LEAST_SECONDS = 0.03

Key = TypeVar("Key", bound=Hashable)


class Progress(Protocol):
    """Receives how far a run is."""

    def __call__(self, name: str, done: int, total: int) -> None:
        """Called when `done` of `total` rounds of a measurement are done."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """What one run took: processor time over all threads of the process, and time on the wall."""

    cpu: float
    wall: float


Measurement = Callable[[], Seconds]


def timed(run: Callable[[], object]) -> Measurement:
    """Return a measurement of the mean time of `run`, repeated for `LEAST_SECONDS`."""

    def measure() -> Seconds:
        cpu, wall, count = time.process_time(), time.perf_counter(), 0
        while True:
            run()
            count += 1
            taken = time.perf_counter() - wall
            if taken >= LEAST_SECONDS:
                return Seconds((time.process_time() - cpu) / count, taken / count)

    return measure


def interleave(
    measurements: Mapping[Key, Measurement], rounds: int, progress: Callable[[int], None]
) -> dict[Key, list[Seconds]]:
    """Take one sample of each measurement in every round, after a round that is not counted.

    Neighbours in the mapping run directly after each other: put those beside each other whose ratio matters.

    Args:
        measurements: what to measure, by name.
        rounds: samples of each.
        progress: called with the number of rounds done.
    """
    samples: dict[Key, list[Seconds]] = {key: [] for key in measurements}
    for done in range(rounds + 1):
        for key, measure in measurements.items():
            sample = measure()
            if done:
                samples[key].append(sample)
        progress(done)
    return samples


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios within the rounds, which drift of the machine does not touch."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
