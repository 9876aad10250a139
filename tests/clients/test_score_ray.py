"""`dape score --ray` with a real Ray: a worker and the job are killed; the sums are those of one process."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dape_server.cli.score_log import SCORES
from models import TEXT, write_model
from processes import descendants, living, title

pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]
WORKER = "ray::MapWorker"
DOCUMENTS = 24
PATIENCE = 120


def write_documents(folder: Path) -> None:
    """Write texts of several lengths, most of them in files, some as lines of JSON, one too short."""
    words = TEXT[0].split()
    folder.mkdir()
    texts = [" ".join(random.Random(n).choices(words, k=500 + 20 * n)) for n in range(DOCUMENTS - 1)]
    for number, text in enumerate(texts[8:]):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in [*texts[:8], ""]]
    (folder / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")


class Job:
    """One `dape score` as a process."""

    def __init__(self, model: Path, texts: Path, progress: Path, *options: str):
        self.numbers = progress.with_suffix(".json")
        self._scores = progress / SCORES
        command = [sys.executable, "-m", "dape_server", "score", str(model), str(texts), "--threads", "1"]
        settings = ["--window", "sliding", "--context-length", "256", "--stride", "64"]
        files = ["--progress", str(progress), "--json", str(self.numbers)]
        self._process = subprocess.Popen(
            [*command, *settings, *files, "--kv-cache-memory", "8MiB", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def names(self) -> list[str]:
        """The documents that have a line."""
        if not self._scores.exists():
            return []
        whole = self._scores.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line)["name"] for line in whole.splitlines()]

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self._process.poll() is None, self._process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what was said."""
        said = self._process.communicate(timeout=PATIENCE)[1].decode()
        return self._process.returncode, said


def test_kills_lose_nothing_and_score_nothing_twice(tmp_path: Path) -> None:
    model, texts = write_model(tmp_path / "tiny"), tmp_path / "texts"
    write_documents(texts)
    alone = Job(model, texts, tmp_path / "alone")
    code, said = alone.end()
    assert code == 0, said
    assert "lines.jsonl:9" in said

    job = Job(model, texts, tmp_path / "many", "--ray")
    job.wait_for(lambda: len(job.names()) >= 2)
    worker = next(pid for pid in descendants(job.pid) if title(pid).startswith(WORKER))
    os.kill(worker, signal.SIGKILL)
    before = len(job.names())
    job.wait_for(lambda: len(job.names()) >= before + 2)
    # Some of Ray's own helpers take up to a minute to notice.
    workers = [pid for pid in descendants(job.pid) if title(pid).startswith(WORKER)]
    os.kill(job.pid, signal.SIGKILL)
    job.end()
    done = job.names()
    assert len(done) < DOCUMENTS

    again = Job(model, texts, tmp_path / "many", "--ray")
    code, said = again.end()
    assert code == 0, said
    assert again.names()[: len(done)] == done
    assert len(again.names()) == len(set(again.names())) == DOCUMENTS
    assert again.numbers.read_text() == alone.numbers.read_text()
    assert workers
    assert not living(workers)
