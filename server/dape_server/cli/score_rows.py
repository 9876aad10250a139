"""The rows that `dape score` prints: as numbers, as JSON, and beside those of an earlier run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from dape_engine.errors import SettingsError
from dape_engine.statistics import PairedDifference, PositionBucket, Statistics, paired_difference
from dape_server.arrays import FLOATS, INTEGERS, decode, encode


@dataclass(frozen=True, slots=True)
class Row:
    """One text at one context length or by one window."""

    label: int | str
    """The length, or the window's name."""
    statistics: Statistics
    scored: tuple[tuple[int, int], ...] = ()
    """Ranges of scored tokens, in order; none: only the sums are kept."""
    token_ids: Sequence[int] = ()
    """Of the scored tokens."""
    logprobs: Sequence[float] = ()
    positions: tuple[PositionBucket, ...] = ()
    """Of a row by windows."""
    difference: PairedDifference | None = None

    @property
    def points(self) -> list[tuple[int, float, float]]:
        """What is drawn: (length, or greatest context of a bucket; perplexity; its error)."""
        parts = [(bucket.end, bucket.statistics) for bucket in self.positions]
        if isinstance(self.label, int):
            parts = [(self.label, self.statistics)]
        return [(at, part.perplexity or 0.0, part.perplexity_stderr or 0.0) for at, part in parts]

    def as_json(self) -> dict[str, Any]:
        """Return the row for other programs, with what a later `--reference` needs."""
        numbers = self.statistics
        row: dict[str, Any] = {
            "length" if isinstance(self.label, int) else "window": self.label,
            "num_scored": numbers.num_scored,
            "nll_sum": numbers.nll_sum,
            "mean_nll": numbers.mean_nll,
            "perplexity": numbers.perplexity,
            "stderr": numbers.perplexity_stderr,
            "bits_per_byte": numbers.bits_per_byte,
        }
        if self.difference is not None:
            row["paired_difference"] = {
                "num_paired": self.difference.num_paired,
                "mean_difference": self.difference.mean_difference,
                "stderr": self.difference.stderr,
                "perplexity_ratio": self.difference.perplexity_ratio,
            }
        if self.positions:
            row["by_position"] = [
                {
                    "from": bucket.start,
                    "to": bucket.end,
                    "num_scored": bucket.statistics.num_scored,
                    "nll_sum": bucket.statistics.nll_sum,
                    "perplexity": bucket.statistics.perplexity,
                    "stderr": bucket.statistics.perplexity_stderr,
                }
                for bucket in self.positions
            ]
        if self.scored:
            row["scored"] = self.scored
            row["token_ids"] = encode(self.token_ids, INTEGERS)
            row["token_logprobs"] = encode(self.logprobs, FLOATS)
        return row


def merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ranges in order with adjacent ones as one."""
    found: list[tuple[int, int]] = []
    for begin, end in ranges:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return tuple(found)


class ReferencePosition(BaseModel):
    """A bucket of context lengths of an earlier `--json`."""

    to: int
    perplexity: float | None


class ReferenceRow(BaseModel):
    """A row of an earlier `--json`, as far as it is read."""

    length: int | None = None
    window: str | None = None
    perplexity: float | None
    by_position: list[ReferencePosition] = []
    scored: list[tuple[int, int]]
    token_ids: str
    token_logprobs: str

    @property
    def points(self) -> list[tuple[int, float]]:
        """What is drawn, as `Row.points` without errors."""
        if self.length is not None:
            return [(self.length, self.perplexity or 0.0)]
        return [(bucket.to, bucket.perplexity or 0.0) for bucket in self.by_position]


class Reference:
    """What an earlier run wrote."""

    def __init__(self, path: Path, files: dict[str, list[ReferenceRow]]):
        self._path = path
        self._files = files

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file of an earlier `--json`.

        Raises:
            SettingsError: it cannot be read, or is another kind of file.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SettingsError(f"cannot read --reference {path}: {error.strerror}") from error
        try:
            return cls(path, TypeAdapter(dict[str, list[ReferenceRow]]).validate_json(content))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise SettingsError(
                f"--reference {path} was not written by `dape score --json`: {place}: {first['msg']}"
            ) from error

    def row(self, file: str, label: int | str) -> ReferenceRow:
        """Return the row of a file at a length, or by whatever window it was scored.

        Raises:
            SettingsError: there is none.
        """
        for row in self._files.get(file, ()):
            if row.length == label if isinstance(label, int) else row.window is not None:
                return row
        what = f"length {label}" if isinstance(label, int) else "any window"
        raise SettingsError(f"--reference {self._path} holds no row of {file} for {what}")

    def difference(self, file: str, row: Row) -> PairedDifference:
        """Return the differences of the tokens that a row and the reference have both scored.

        Raises:
            SettingsError: the reference has no such row, is of another text or tokenizer, or has no scored
                token in common.
        """
        other = self.row(file, row.label)
        try:
            ids, logprobs = decode(other.token_ids, INTEGERS), decode(other.token_logprobs, FLOATS)
        except ValueError as error:
            raise SettingsError(f"--reference {self._path}: an array of {file} {error}") from error
        places = _places(other.scored)
        if not len(ids) == len(logprobs) == len(places):
            raise SettingsError(f"--reference {self._path}: the arrays of {file} differ in length")
        common, own, theirs = np.intersect1d(_places(row.scored), places, return_indices=True)
        different = np.flatnonzero(np.asarray(row.token_ids)[own] != ids[theirs])
        if len(different):
            raise SettingsError(
                f"--reference {self._path}: {file} was another text or had another tokenizer, "
                f"token {common[different[0]]} differs"
            )
        if not len(common):
            raise SettingsError(f"--reference {self._path}: no scored token of {file} in common")
        return paired_difference(np.asarray(row.logprobs)[own].tolist(), -logprobs[theirs])


def _places(ranges: Iterable[tuple[int, int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([np.empty(0, np.int64), *(np.arange(begin, end) for begin, end in ranges)])
