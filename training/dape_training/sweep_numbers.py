"""What the numbers of a sweep say: means over seeds, and differences between runs with their errors.

All runs were scored on the same targets, so two of them are compared target by target. Errors of a difference
have two parts, added in squares: between documents (targets of one document are not independent) and, where
both runs have several seeds in common, between seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dape_training.evaluate import mean_and_error

STANDARD = {"version": 1, "width": 32, "kernel": 1, "form": "concat_residual"}
"""DAPE as its paper proposes it: variants are compared with it."""
SIGNIFICANT = 2.0
"""A difference of fewer standard errors is called none."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two mean losses, in nats a token."""

    mean: float
    error: float

    @property
    def verdict(self) -> int:
        """-1 or 1 where the difference is below or above 0 beyond doubt, else 0."""
        return 0 if abs(self.mean) <= SIGNIFICANT * self.error else int(math.copysign(1, self.mean))


@dataclass(frozen=True, slots=True)
class Run:
    """One run with all its seeds."""

    name: str
    label: str
    static: str | None
    dape: dict[str, Any] | None
    seeds: dict[int, dict[str, Any]]
    """The rows of the file by seed."""

    def losses(self, length: int) -> dict[int, list[float]]:
        """Return the loss of every target by seed; empty where the model cannot read so far."""
        found = {seed: row["nll"].get(str(length)) for seed, row in self.seeds.items()}
        return {seed: losses for seed, losses in found.items() if losses}

    def perplexity(self, length: int) -> tuple[float, float | None] | None:
        """Return the mean over seeds and its standard error (None for one seed); None if not measured."""
        values = [math.exp(fmean(losses)) for losses in self.losses(length).values()]
        if not values:
            return None
        mean, error = mean_and_error(values)
        return mean, error if len(values) > 1 else None

    @property
    def is_standard(self) -> bool:
        """Whether this is DAPE as its paper proposes it."""
        return self.dape is not None and all(self.dape[name] == value for name, value in STANDARD.items())


@dataclass(frozen=True, slots=True)
class Numbers:
    """The file of one data set."""

    head: dict[str, Any]
    runs: dict[str, Run]

    @classmethod
    def read(cls, content: dict[str, Any]) -> Numbers:
        """Return what a file of `collect_results` holds."""
        runs: dict[str, Run] = {}
        for row in content["rows"]:
            name = row["run"]
            run = runs.setdefault(name, Run(name, row["label"], row["static"], row["dape"], {}))
            run.seeds[row["seed"]] = row
        return cls(content, runs)

    @property
    def lengths(self) -> list[int]:
        """The context lengths, in rising order."""
        return sorted(self.head["protocol"]["lengths"])

    @property
    def key_runs(self) -> list[str]:
        """The runs that the sweep trains with several seeds (all, where none has several), in its order."""
        return [name for name in self.runs if name.removesuffix("-yarn") in self.head["key_runs"]]

    @property
    def is_partial(self) -> bool:
        """Whether runs of the sweep are missing."""
        return bool(self.head["runs_scored"] < self.head["runs_planned"])

    def standard_of(self, run: Run) -> Run | None:
        """Return the standard DAPE over the same static encoding as a variant of it."""
        if run.static is None or run.is_standard:
            return None
        own = (other for other in self.runs.values() if other.static == run.static and other.is_standard)
        return next(own, None)

    def difference(
        self, run: Run, other: Run, length: int, other_length: int | None = None
    ) -> Difference | None:
        """Return how much larger the loss of `run` is than that of `other`; None if they share no seed.

        Args:
            run: whose loss.
            other: the run it is compared with.
            length: of the context.
            other_length: of the other's context; by default the same.
        """
        own, others = run.losses(length), other.losses(other_length or length)
        seeds = sorted(own.keys() & others.keys())
        if not seeds:
            return None
        by_seed = [[a - b for a, b in zip(own[seed], others[seed], strict=True)] for seed in seeds]
        by_document = defaultdict(list)
        for (document, _), *differences in zip(self.head["targets"], *by_seed, strict=True):
            by_document[document].append(fmean(differences))
        # Documents weigh as many targets as they have, which is the same number for all but short ones.
        mean = fmean(value for differences in by_seed for value in differences)
        _, document_error = mean_and_error([fmean(values) for values in by_document.values()])
        _, seed_error = mean_and_error([fmean(differences) for differences in by_seed])
        return Difference(mean, math.hypot(document_error, seed_error))


def variants(numbers: Numbers) -> Sequence[tuple[Run, Run]]:
    """Return every run with a DAPE that is not the standard one, with the standard one of its encoding."""
    pairs = ((run, numbers.standard_of(run)) for run in numbers.runs.values())
    return [(run, standard) for run, standard in pairs if standard is not None]


def with_static(numbers: Numbers) -> Sequence[tuple[Run, Run]]:
    """Return every run with DAPE that has its static encoding beside it, with that."""
    return [
        (run, numbers.runs[run.static])
        for run in numbers.runs.values()
        if run.static is not None and run.static in numbers.runs
    ]
