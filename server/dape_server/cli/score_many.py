"""`dape score --ray` and `--progress`: many documents over many engines, with what is done on the disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_engine.weights import CONFIG
from dape_server.cli.documents import Document
from dape_server.cli.options import build_settings
from dape_server.cli.report import Work, write_json
from dape_server.cli.score_log import Outcome, ScoreLog
from dape_server.cli.score_table import score_table
from dape_server.cli.score_text import OPTIONS
from dape_server.cli.scorer import Scorer

logger = logging.getLogger(__name__)
WORKERS = 2
ENGINE_OPTIONS = ("dtype", "kv_cache_dtype", "attention_backend", "yarn_factor", "max_model_len")
"""Of the engine's options, those that change numbers by more than rounding, or what can be scored."""
PART = 1 << 20
"""Bytes at both ends of a file of weights that tell it from others."""
REFUSED = ("reference_path", "plot")
SHOWN_ERRORS = 5


def score_documents(folder: Path, documents: Sequence[Document], options: dict[str, Any]) -> None:
    """Score what is not yet done, and print the rows of all.

    Args:
        folder: of the model.
        documents: at least one.
        options: of `dape score`.

    Raises:
        SettingsError: options contradict each other, or no document could be scored.
    """
    for option in REFUSED:
        if options[option] is not None:
            name = option.removesuffix("_path")
            raise SettingsError(
                f"--{name}: cannot be combined with --ray or --progress, which keep sums only"
            )
    engine_options = build_settings(EngineOptions, options)
    progress: Path | None = options["progress"]
    settings = _settings(folder, engine_options, options)
    with (
        ScoreLog(progress, settings) if progress is not None else nullcontext() as log,
        Work("documents") as work,
    ):
        outcomes = {} if log is None else log.finished(documents)
        rest = [document for document in documents if document.name not in outcomes]
        if outcomes:
            logger.info("%d of %d documents are done already", len(outcomes), len(documents))
        for outcome in _scored(rest, folder, engine_options, options):
            if log is not None:
                log.add(outcome)
            outcomes[outcome.document.name] = outcome
            work.show("documents", len(outcomes), len(documents))
    _tell(folder.name, [outcomes[document.name] for document in documents], options)


def _scored(
    documents: list[Document], folder: Path, engine_options: EngineOptions, options: dict[str, Any]
) -> Iterator[Outcome]:
    if not documents:
        return
    wanted = {name: options[name] for name in OPTIONS}
    if options["ray"]:
        job = _job()
        workers, address = options["workers"] or WORKERS, options["ray_address"]
        yield from job.score(documents, folder, engine_options, wanted, workers, address)
        return
    scorer = Scorer(folder, engine_options, wanted)
    try:
        yield from map(scorer, documents)
    finally:
        scorer.close()


def _job() -> Any:
    """Return the module that needs Ray, imported only where it is asked for."""
    try:
        return import_module("dape_server.replicas.score_job")
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"--ray needs the package {error.name}; pip install 'dape-serve[ray]' installs it"
        ) from error


def _tell(model: str, outcomes: Sequence[Outcome], options: dict[str, Any]) -> None:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed[:SHOWN_ERRORS]:
        click.echo(f"dape: not scored: {outcome.error}", err=True)
    if len(failed) > SHOWN_ERRORS:
        click.echo(f"dape: not scored: {len(failed) - SHOWN_ERRORS} further documents", err=True)
    results = {outcome.document.name: list(outcome.rows) for outcome in outcomes if outcome.error is None}
    if not results:
        raise SettingsError(f"none of the {len(outcomes)} documents could be scored")
    Console().print(score_table(model, results, options["window"]))
    if options["json_path"] is not None:
        write_json(
            options["json_path"], {name: [row.as_json() for row in rows] for name, rows in results.items()}
        )


def _settings(folder: Path, engine_options: EngineOptions, options: dict[str, Any]) -> dict[str, Any]:
    """Return all that decides the numbers."""
    return {
        **{name: options[name] for name in OPTIONS},
        **{name: getattr(engine_options, name) for name in ENGINE_OPTIONS},
        "model": _fingerprint(folder),
    }


def _fingerprint(folder: Path) -> str:
    """Return a hash of a model's configuration and of both ends of its weights."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(PART))
            file.seek(max(0, size - PART))
            digest.update(file.read(PART))
    return digest.hexdigest()
