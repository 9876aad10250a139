"""Documents scored by many engines at once, as a Ray Data job."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from dape_engine.errors import DapeError, SettingsError
from dape_engine.options import EngineOptions
from dape_server.cli.documents import Document
from dape_server.cli.score_log import Outcome, outcome_of
from dape_server.cli.scorer import Scorer
from dape_server.replicas.connect import connect, last_line

DOCUMENTS_AT_ONCE = 2
"""Documents of one task: what a worker that is killed takes with it is scored again."""


class Worker:
    """One engine in a process of its own."""

    def __init__(self, folder: Path, engine_options: EngineOptions, options: Mapping[str, Any]):
        self._scorer = Scorer(folder, engine_options, options)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Return the line of a document."""
        document = Document(row["name"], row["path"], int(row["start"]), int(row["size"]))
        return {"name": document.name, "line": json.dumps(self._scorer(document).as_json())}


def score(
    documents: Sequence[Document],
    folder: Path,
    engine_options: EngineOptions,
    options: Mapping[str, Any],
    workers: int,
    address: str | None,
) -> Iterator[Outcome]:
    """Yield the outcome of every document once, in any order.

    A worker that dies is started again, and what it was at is scored again.

    Args:
        documents: at least one, readable on every machine of the cluster.
        folder: of the model, on every machine.
        engine_options: of the engines.
        options: those of `dape score`.
        workers: engines.
        address: of the cluster; None: one is started for this job.

    Raises:
        SettingsError: a document is not a file, or Ray cannot be used.
    """
    for document in documents:
        if document.size is None:
            raise SettingsError(f"{document.name}: --ray reads files only")
    cores = os.cpu_count() or 1
    connect(address, max(cores, workers + 1))
    try:
        on_gpu = engine_options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        if engine_options.threads is None and not on_gpu and address is None:
            engine_options = engine_options.model_copy(update={"threads": max(1, cores // workers)})
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        tasks = ray.data.from_items(
            [asdict(document) for document in documents],
            override_num_blocks=math.ceil(len(documents) / DOCUMENTS_AT_ONCE),
        )
        done = tasks.map(
            Worker,
            fn_constructor_args=(folder.resolve(), engine_options, dict(options)),
            compute=ActorPoolStrategy(size=min(workers, math.ceil(len(documents) / DOCUMENTS_AT_ONCE))),
            num_cpus=1,
            num_gpus=1 if on_gpu else 0,
        )
        by_name = {document.name: document for document in documents}
        for row in done.iter_rows():
            yield outcome_of(by_name[row["name"]], json.loads(row["line"]))
    except RayError as error:
        raise DapeError(f"Ray: {last_line(error)}") from error
    finally:
        ray.shutdown()
