"""The programs of examples/, run as their readers run them."""

from __future__ import annotations

import csv
import importlib.util
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.client
REPOSITORY = Path(__file__).parents[2]
BOOK = "It was the best of times, it was the worst of times, it was the age of wisdom.\n\n" * 40


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def run(
    environment: dict[str, str], program: str, *arguments: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"examples/{program}.py", *arguments]
    finished = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished


def test_openai_client(url: str, http: httpx.Client, offline: dict[str, str]) -> None:
    completion, stream, perplexity = run(offline, "openai_client", "--base-url", url).stdout.splitlines()
    text = completion.removeprefix("completion: ")
    assert text.startswith("It was a dark and")
    assert len(text) > len("It was a dark and")
    assert stream.startswith("stream:     It was a dark and ")
    [expected] = http.post("/v1/perplexity", json={"input": text}).json()["data"]
    assert perplexity == f"perplexity: {expected['perplexity']:.2f} over {expected['num_scored']} tokens"


def test_score_book(url: str, http: httpx.Client, offline: dict[str, str], tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    finished = run(offline, "score_book", str(book), "--base-url", url, "--lengths", "300,512")
    head, sliding, *rungs = csv.reader(finished.stdout.splitlines())
    assert head == ["context", "scored", "perplexity", "stderr"]
    body = {"input": BOOK, "window": "sliding", "context_length": 1024, "lengths": [300, 512]}
    [expected] = http.post("/v1/perplexity", json={**body, "ladder": "suffix"}).json()["data"]
    assert sliding[:2] == ["sliding", str(expected["num_scored"])]
    assert float(sliding[2]) == pytest.approx(expected["perplexity"], abs=2e-3)
    assert [row[:2] for row in rungs] == [["300", "256"], ["512", "256"]]
    for row, rung in zip(rungs, expected["ladder"], strict=True):
        assert float(row[2]) == pytest.approx(rung["perplexity"], abs=2e-3)
    done, total = re.findall(r"(\d+) of (\d+) tokens", finished.stderr)[-1]
    assert done == total


def test_score_book_says_what_is_refused(url: str, offline: dict[str, str], tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It was")
    finished = run(offline, "score_book", str(book), "--base-url", url, "--context-length", "1", code=1)
    assert finished.stderr == "context_length must be at least 2, got 1\n"


@needs("lm_eval")
def test_lm_eval_tasks(url: str, offline: dict[str, str]) -> None:
    assert run(offline, "lm_eval_tasks", "--base-url", url).stdout.endswith("accuracy: 1.00\n")


@needs("transformers")
def test_convert_checkpoint(offline: dict[str, str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finished = run(offline, "convert_checkpoint", "--port", str(port))
    found = re.search(r"perplexity \d+\.\d+, largest difference (\S+)\n", finished.stdout)
    assert found, finished.stdout
    assert float(found[1]) < 1e-4
