"""The texts that `dape score` is given: files, lines of JSON, and folders of both."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dape_engine.errors import SettingsError

STANDARD_INPUT = "-"
LINES = ".jsonl"
SUFFIXES = (".txt", ".text", ".md", LINES)
"""Of the files of a folder that are texts."""
FIELD = "text"


@dataclass(frozen=True, slots=True)
class Document:
    """One text, not read yet."""

    name: str
    """The file's path, with the number of the line in a file of lines."""
    path: str
    """Of the file, or `STANDARD_INPUT`."""
    start: int = 0
    """First byte."""
    size: int | None = None
    """Bytes; None: all."""

    def read(self) -> str:
        """Return the text.

        Raises:
            SettingsError: it cannot be read, is not UTF-8, or a line is not an object with a text.
        """
        try:
            if self.path == STANDARD_INPUT:
                return sys.stdin.read()
            with Path(self.path).open("rb") as file:
                file.seek(self.start)
                # As in text mode.
                content = file.read(-1 if self.size is None else self.size).decode("utf-8")
        except OSError as error:
            raise SettingsError(f"cannot read {self.name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise SettingsError(f"{self.name} is not UTF-8 text: byte {error.start} is not valid") from error
        if not self.path.endswith(LINES):
            return content.replace("\r\n", "\n").replace("\r", "\n")
        try:
            text = json.loads(content)[FIELD]
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{self.name} is not a JSON object with a field {FIELD!r}") from error
        if not isinstance(text, str):
            raise SettingsError(f"{self.name}: {FIELD} must be a text, got a {type(text).__name__}")
        return text


def find_documents(names: Iterable[str]) -> list[Document]:
    """Return the documents of files and folders, each once, a folder's in the order of their paths.

    Raises:
        SettingsError: a file cannot be read, a folder holds no text, or there is no document at all.
    """
    found = list(dict.fromkeys(document for name in names for document in _documents(name)))
    if not found:
        raise SettingsError("the files hold no document")
    return found


def _documents(name: str) -> Iterator[Document]:
    path = Path(name)
    if name != STANDARD_INPUT and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise SettingsError(f"{name} holds no file that ends with one of {', '.join(SUFFIXES)}")
        for file in files:
            yield from _documents(str(file))
    elif name.endswith(LINES):
        yield from _lines(name)
    else:
        yield Document(name, name, size=None if name == STANDARD_INPUT else _size(path))


def _lines(name: str) -> Iterator[Document]:
    start = 0
    try:
        with Path(name).open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(f"{name}:{number}", name, start, len(line))
                start += len(line)
    except OSError as error:
        raise SettingsError(f"cannot read {name}: {error.strerror}") from error


def _size(path: Path) -> int | None:
    """Return the size of a file; None where it has none, such as a pipe's."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
