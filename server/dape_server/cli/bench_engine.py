"""`dape bench engine`: prefill, decoding, memory and start of the whole engine, alone or beside a peer."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dape_engine.bench.llama_cpp import LlamaCpp
from dape_engine.bench.measure import Plan, measure_model
from dape_engine.bench.models import RANDOM_MODELS, model_folder
from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_engine.weights import DEFAULT_MODEL, load_config
from dape_kernels.bench.machine import machine
from dape_server.cli.first_token import seconds_to_first_token
from dape_server.cli.options import build_settings, config_option, settings_options
from dape_server.cli.report import parse_lengths, write_json

logger = logging.getLogger(__name__)
PLAN = Plan()
MEMORY = {"peak_rss_mib": "peak RSS", "peak_rss_without_cache_mib": "less the cache"}


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL...]")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option("--lengths", default=_listed(PLAN.prefill_lengths), show_default=True, help="Prompts.")
@click.option("--contexts", default=_listed(PLAN.decode_contexts), show_default=True, help="Cached tokens.")
@click.option("--streams", default=_listed(PLAN.decode_streams), show_default=True, help="Decode at once.")
@click.option("--tokens", type=click.IntRange(2), default=PLAN.decode_tokens, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=PLAN.repeats, show_default=True, help="Rounds.")
@click.option(
    "--peer",
    type=click.Choice([LlamaCpp.name]),
    help="Measure another engine in turn: the same shape with ALiBi and without DAPE.",
)
@click.option("--busy-neighbour", is_flag=True, help="Measure again beside a process that keeps a core busy.")
@config_option
@settings_options(EngineOptions)
def engine(models: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Measure prefill and decoding speed, peak memory and the start of each MODEL.

    MODEL is a folder, a shipped model, or one with random weights: "small" (6 layers of 6 heads x 64) or
    "125m" (12 layers of 12 heads x 64, vocabulary 50304). Without any: the shipped default, small and 125m.
    The cache is as large as each measurement needs, whatever --kv-cache-memory says.
    """
    settings = build_settings(EngineOptions, options)
    plan = Plan(
        tuple(parse_lengths(options["lengths"])),
        tuple(parse_lengths(options["contexts"], "--contexts")),
        tuple(parse_lengths(options["streams"], "--streams")),
        options["tokens"],
        options["repeats"],
        options["busy_neighbour"],
    )
    try:
        facts = machine()
    except ValueError as error:  # a wrong setting in the environment
        raise SettingsError(str(error)) from error
    facts["threads"] = settings.threads or facts["threads"]
    results: dict[str, Any] = {
        "machine": facts,
        "settings": settings.model_dump(exclude={"kv_cache_memory"}),
        "models": {},
    }
    for name in models or (DEFAULT_MODEL, *RANDOM_MODELS):
        with TemporaryDirectory() as scratch:
            folder = model_folder(name, Path(scratch))
            # A line for every file that the peer's model is made of would bury the progress.
            logging.getLogger("gguf").setLevel(logging.WARNING)
            peer = LlamaCpp(load_config(folder), Path(scratch), facts["threads"]) if options["peer"] else None
            figures = measure_model(folder, settings, plan, peer, partial(logger.info, "%s: %s", name))
            figures["seconds_to_first_token"] = seconds_to_first_token(folder, settings)
        results["models"][Path(name).name] = figures
        _show(name, figures)
        if json_path is not None:
            write_json(json_path, results)


def _show(name: str, figures: dict[str, Any]) -> None:
    peer = figures.get("peer", {})
    slowdowns = figures.get("slowdown_beside_busy_neighbour", {})
    columns = ["engine", *((peer["name"], "ratio") if peer else ())]
    columns += [f"{contestant}, busy" for contestant in slowdowns]
    caption = "busy: slowdown beside a process that keeps one core busy" if slowdowns else None
    table = Table(title=f"{name}, attention {figures['attention_backend']}", caption=caption)
    table.add_column("what", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for kind in ("prefill", "decode"):
        for case, speed in figures[kind].items():
            cells = [_speed(speed)]
            if peer:
                cells += [_speed(peer[kind][case]), f"{peer['engine_over_peer'][kind][case]:.2f}"]
            cells += [f"{slowdown[kind][case]:.2f}" for slowdown in slowdowns.values()]
            table.add_row(f"{kind} {case}, tokens/s", *cells)
    for kind, label in MEMORY.items():
        for case, size in figures[kind].items():
            table.add_row(f"{label} at {case}, MiB", f"{size:,}")
    table.add_row("start to first token, s", f"{figures['seconds_to_first_token']:.2f}")
    Console().print(table)


def _speed(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.1f}"
