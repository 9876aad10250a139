"""What a long scoring has done, in a folder, so that it can be killed at any time and go on.

`settings.json` says what is scored how; `scores.jsonl` has a line for every finished document, on the disk
before the next one counts. A line that a kill has cut off is no line.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dape_engine.errors import SettingsError
from dape_engine.statistics import Statistics
from dape_server.cli.documents import Document
from dape_server.cli.score_rows import Row

SETTINGS, SCORES = "settings.json", "scores.jsonl"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished document."""

    document: Document
    rows: tuple[Row, ...] = ()
    error: str | None = None
    """Why it has no rows."""

    def as_json(self) -> dict[str, Any]:
        """Return what a line holds."""
        return {
            "name": self.document.name,
            "start": self.document.start,
            "size": self.document.size,
            "rows": [_row(row) for row in self.rows],
            "error": self.error,
        }


def outcome_of(document: Document, line: Mapping[str, Any]) -> Outcome:
    """Return the outcome that a line holds; its rows have sums and no tokens."""
    rows = tuple(Row(row["label"], Statistics(**{key: row[key] for key in _SUMS})) for row in line["rows"])
    return Outcome(document, rows, line["error"])


_SUMS = ("num_scored", "nll_sum", "nll_square_sum", "num_bytes")


def _row(row: Row) -> dict[str, Any]:
    return {"label": row.label, **{key: getattr(row.statistics, key) for key in _SUMS}}


class ScoreLog:
    """The folder of one scoring, which one process at a time may use.

    Args:
        folder: made where it is missing.
        settings: all that decides the numbers.

    Raises:
        SettingsError: the folder belongs to a scoring with other settings, is in use, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / SCORES).open("a+b")
        except OSError as error:
            raise SettingsError(f"--progress {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check(json.loads(json.dumps(settings)))
            self._lines = self._read()
        except OSError as error:
            self._file.close()
            raise SettingsError(f"--progress {folder}: another process uses it") from error
        except SettingsError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._file.close()

    def finished(self, documents: Iterable[Document]) -> dict[str, Outcome]:
        """Return the outcomes of those documents that are done, by name."""
        return {
            document.name: outcome_of(document, line)
            for document in documents
            if (line := self._lines.get((document.name, document.start, document.size))) is not None
        }

    def add(self, outcome: Outcome) -> None:
        """Note a finished document; it is on the disk when this returns."""
        line = outcome.as_json()
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check(self, settings: dict[str, Any]) -> None:
        path = self._folder / SETTINGS
        if not path.exists():
            new = path.with_suffix(".new")
            new.write_text(json.dumps(settings, indent=2) + "\n")
            new.replace(path)
            return
        found = json.loads(path.read_text())
        if changed := sorted(
            key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key)
        ):
            key = changed[0]
            raise SettingsError(
                f"--progress {self._folder} is of another scoring: {key} was {found.get(key)!r} there "
                f"and is {settings.get(key)!r} now"
            )

    def _read(self) -> dict[tuple[str, int, int | None], dict[str, Any]]:
        """Return the lines by document, and cut off one that is not whole."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = [json.loads(line) for line in whole.splitlines()]
        return {(line["name"], line["start"], line["size"]): line for line in lines}
