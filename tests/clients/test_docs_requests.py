"""Every `curl` of the README and the pages of docs/, run as it stands against a real server."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]
REPOSITORY = Path(__file__).parents[2]
HOSTS = ("http://127.0.0.1:8000", "localhost:8000")
CHAT = "/v1/chat/completions"
"""Needs a model with a chat template, which the shipped one has not."""


def requests() -> Iterator[tuple[str, list[str]]]:
    """The command lines that call this server, with their pages."""
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        lines = iter(page.read_text(encoding="utf-8").splitlines())
        for line in lines:
            if line.strip().startswith("curl "):
                words = _words(line, lines)
                if any(host in word for host in HOSTS for word in words):
                    yield page.name, words


def _words(text: str, further: Iterator[str]) -> list[str]:
    """Split a command into words; it goes on behind a backslash, and until its quotes are closed."""
    while True:
        if not text.endswith("\\"):
            try:
                return shlex.split(text)
            except ValueError:
                text += "\n"
        text = text.removesuffix("\\") + next(further)


REQUESTS = list(requests())


def test_there_are_requests() -> None:
    assert {"README.md", "quick_start.md", "api.md", "routes.md"} <= {page for page, _ in REQUESTS}


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=f"{page}-{number}") for number, (page, words) in enumerate(REQUESTS)]
)
def test_a_documented_request_is_answered(url: str, words: list[str]) -> None:
    for host in HOSTS:
        words = [word.replace(host, url) for word in words]
    command = [*words, "--silent", "--show-error", "--max-time", "60", "--write-out", "\n%{http_code}"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert finished.returncode == 0, finished.stderr
    body, _, status = finished.stdout.rpartition("\n")
    if any(CHAT in word for word in words):
        assert (status, '"no_chat_template"' in body) == ("400", True)
    else:
        assert status == "200", body
