"""`dape visualize`: the learned bias of one query, static and adapted (figure 1 of the DAPE paper)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import click

from dape_engine.errors import RequestError, SettingsError
from dape_engine.inspection import Inspection, InspectionRequest
from dape_engine.options import EngineOptions
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_server.cli.model import running_engine
from dape_server.cli.options import config_option, settings_options
from dape_training.data import read_documents
from dape_training.figures import check_suffix, draw_biases, summarise_biases
from dape_training.files import whole_file


@click.command()
@click.argument("model", default=DEFAULT_MODEL, metavar="[MODEL]")
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the model reads: a text file, or JSON Lines (.jsonl, .jsonl.xz) of which a document is taken.",
)
@click.option(
    "--document", type=click.IntRange(0), default=0, show_default=True, help="Of JSON Lines, from 0."
)
@click.option(
    "--query", type=click.IntRange(1), default=8192, show_default=True, help="Position of the query token."
)
@click.option("--layers", help="Numbers with commas between them, from 0. [default: first, middle and last]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="SVG, PNG or PDF by suffix.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the numbers that the figure is drawn from.",
)
@config_option
@settings_options(EngineOptions)
def visualize(
    model: str,
    text_file: Path,
    document: int,
    query: int,
    layers: str | None,
    out: Path | None,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Draw the biases that one query of a text adds to the scores of its keys, for every head.

    Left the static bias B of the positions alone, right the adapted bias B + f(A, B).
    """
    if out is None and json_path is None:
        raise SettingsError("expected --out FILE, --json FILE, or both")
    if out is not None:
        check_suffix(out, "--out")
    folder = resolve_model(model)
    text = _read(text_file, document)
    found = asyncio.run(_inspect(folder, text, query, layers, options))
    biases = summarise_biases(folder.name, query, found.keys, found.layers)
    if json_path is not None:
        with whole_file(json_path) as new:
            new.write_text(json.dumps(biases) + "\n")
    if out is not None:
        draw_biases(out, biases)


async def _inspect(
    folder: Path, text: str, query: int, layers: str | None, options: dict[str, Any]
) -> Inspection:
    async with running_engine(folder, options) as engine:
        config = engine.config
        if not config.has_bias and config.dape is None:
            raise SettingsError(f"{folder.name} has no bias to show: its encoding is {config.position.kind}")
        last = config.num_hidden_layers - 1
        chosen = _numbers(layers) if layers else tuple(sorted({0, last // 2, last}))
        tokens = tuple(engine.tokenizer.encode(text))
        if len(tokens) <= query:
            raise RequestError(f"--query {query}: the text has {len(tokens)} tokens only", param="query")
        heads = tuple(range(config.num_attention_heads))
        return await engine.inspect(InspectionRequest("visualize", tokens, query, chosen, heads))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(entry) for entry in text.split(","))
    except ValueError as error:
        raise SettingsError(f"--layers {text}: expected whole numbers with commas between them") from error


def _read(path: Path, document: int) -> str:
    """Return the text of a file, or one document of JSON Lines."""
    try:
        if ".jsonl" not in path.suffixes:
            return path.read_text(encoding="utf-8")
        documents = read_documents(path)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"--text {path}: {error!r}") from error
    if document >= len(documents):
        raise SettingsError(f"--document {document}: {path} has {len(documents)} documents")
    return documents[document]
