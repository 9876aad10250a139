"""Perplexity by context length for the runs of a sweep, kept beside each run.

All runs of a data set are scored at the same ends of the same documents, so that they can be compared end by
end; a model that cannot read so far is scored at the lengths it can read. The longest pass also
gives the loss at every position.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dape_engine.engine import AsyncEngine
from dape_training.data import Corpus
from dape_training.evaluate import choose_targets, score_end, score_positions
from dape_training.files import write_json
from dape_training.sweep import Job

# Two for each octave.
POSITION_EDGES = (1, 32, 64, 96, *(step << octave for octave in range(6, 13) for step in (2, 3)), 16384)

StartEngine = Callable[[Path, float | None], AbstractAsyncContextManager[AsyncEngine]]
"""(model folder, YaRN's factor) -> a running engine."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is scored."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    ends_per_document: int = 2
    score_last: int = 256
    dtype: str = "auto"
    """Of the engine's weights and products."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model to score: a run as it is, or a RoPE run with YaRN."""

    job: Job
    yarn: bool = False

    @property
    def name(self) -> str:
        """Of the job, with what was done to it."""
        return f"{self.job.name}, YaRN" if self.yarn else self.job.name

    @property
    def path(self) -> Path:
        """The file of its numbers."""
        return self.job.folder / ("evaluation-yarn.json" if self.yarn else "evaluation.json")

    def lengths(self, protocol: Protocol) -> list[int]:
        """The lengths that the model can read."""
        return [length for length in protocol.lengths if length <= self.job.config.model.max_model_len]

    def is_done(self, protocol: Protocol) -> bool:
        """Whether the file holds the numbers of this model under this protocol."""
        if not self.path.exists():
            return False
        found = json.loads(self.path.read_text())
        return bool(found["protocol"] == plain(protocol) and found["model"] == fingerprint(self.job))


def evaluations(job: Job) -> Iterator[Evaluation]:
    """Yield what is scored of a finished run."""
    yield Evaluation(job)
    if job.config.model.position.kind == "rope" and job.config.model.dape is None:
        yield Evaluation(job, yarn=True)


def fingerprint(job: Job) -> str:
    """Return a short name of the weights."""
    return hashlib.sha256((job.folder / "model" / "model.safetensors").read_bytes()).hexdigest()[:16]


async def evaluate_run(
    evaluation: Evaluation,
    protocol: Protocol,
    start_engine: StartEngine,
    progress: Callable[[int, int], None],
) -> None:
    """Score one model and write its file.

    Args:
        evaluation: of a finished run.
        protocol: what is scored.
        start_engine: makes the engine.
        progress: called with the tokens read so far and in all.

    Raises:
        RequestError: no document is long enough.
    """
    job = evaluation.job
    texts = Corpus.of(job.config.valid_data).documents()
    lengths = evaluation.lengths(protocol)
    samples: dict[int, list[float]] = {}
    positions: list[list[float]] = []
    done = 0
    # YaRN stretches by the wanted length: every length has an engine of its own.
    groups = [[length] for length in lengths] if evaluation.yarn else [lengths]
    for group in groups:
        factor = max(group) / job.config.model.train_length if evaluation.yarn else None
        async with start_engine(job.folder / "model", factor) as engine:
            documents = [engine.tokenizer.encode(text) for text in texts]
            targets = choose_targets(
                documents, protocol.lengths, protocol.ends_per_document, protocol.score_last
            )
            total = len(targets) * sum(lengths)
            for length, (index, end) in itertools.product(group, targets):
                document = documents[index]
                if length == protocol.lengths[-1] > protocol.score_last:
                    logprobs = await score_positions(engine, document, end, length)
                    positions.append(_by_position(logprobs))
                    loss = -math.fsum(logprobs[-protocol.score_last :]) / protocol.score_last
                else:
                    loss = await score_end(engine, document, end, length, protocol.score_last)
                samples.setdefault(length, []).append(loss)
                done += length
                progress(done, total)
    write_json(
        evaluation.path,
        {
            "protocol": plain(protocol),
            "model": fingerprint(job),
            "targets": targets,
            "nll": samples,
            "position_edges": POSITION_EDGES,
            "position_nll": positions,
        },
    )


def _by_position(logprobs: list[float]) -> list[float]:
    """Return the mean loss of the tokens between neighbouring edges; entry n - 1 has n tokens before it."""
    return [
        -math.fsum(logprobs[low - 1 : high - 1]) / len(logprobs[low - 1 : high - 1])
        for low, high in itertools.pairwise(POSITION_EDGES)
        if high <= len(logprobs) + 1
    ]


def plain(protocol: Protocol) -> dict[str, Any]:
    """Return the protocol as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(protocol)))
    return plain
