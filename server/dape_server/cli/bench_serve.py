"""`dape bench serve`: streaming clients and scoring over HTTP, alone or beside llama.cpp's server."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dape_engine.bench.llama_cpp import find_program
from dape_engine.bench.models import RANDOM_MODELS, model_folder
from dape_engine.bench.process import EngineProcess
from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_engine.weights import load_config
from dape_kernels.bench.machine import machine
from dape_server.cli.options import build_settings, config_option, settings_options
from dape_server.cli.report import parse_lengths, write_json
from dape_server.load.llama_server import PROGRAM, llama_server
from dape_server.load.measure import Plan, Prompts, measure_scoring, measure_streams, summary
from dape_server.load.process import dape_server

logger = logging.getLogger(__name__)
PLAN = Plan()
OWN = "dape-serve"
LABELS = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p95": "TTFT p95, ms",
    "itl_ms_p50": "ITL p50, ms",
    "itl_ms_p95": "ITL p95, ms",
    "tokens_per_output": "tokens per streamed output",
    "client_cores": "cores taken by the client",
    "step_share": "engine steps / wall time",
    "model_share": "model and sampler / wall time",
}


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL...]")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option("--streams", type=click.IntRange(1), default=PLAN.streams, show_default=True, help="Clients.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=PLAN.prompt_tokens, show_default=True)
@click.option("--output-tokens", type=click.IntRange(2), default=PLAN.output_tokens, show_default=True)
@click.option(
    "--requests", type=click.IntRange(1), default=PLAN.requests, show_default=True, help="Of each client."
)
@click.option(
    "--scored", default=",".join(map(str, PLAN.scored_lengths)), show_default=True, help="Inputs to score."
)
@click.option("--repeats", type=click.IntRange(1), default=PLAN.repeats, show_default=True, help="Rounds.")
@click.option(
    "--peer",
    type=click.Choice(["auto", PROGRAM, "none"]),
    default="auto",
    show_default=True,
    help="Measure llama.cpp's server in turn, with ALiBi and without DAPE. auto: if installed.",
)
@config_option
@settings_options(EngineOptions)
def serve(models: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Measure what streaming clients see of `dape serve` with each MODEL.

    MODEL is a folder, a shipped model, or one with random weights: "small" (6 layers of 6 heads x 64) or
    "125m" (12 layers of 12 heads x 64, vocabulary 50304). Without any: small and 125m. Clients run in this
    process, on raw sockets, and every server in a process of its own.
    """
    settings = build_settings(EngineOptions, options)
    scored = tuple(parse_lengths(options["scored"], "--scored"))
    plan = Plan(
        options["streams"],
        options["prompt_tokens"],
        options["output_tokens"],
        options["requests"],
        scored,
        options["repeats"],
    )
    peer = _peer(options["peer"])
    facts = machine()
    facts["threads"] = settings.threads or facts["threads"]
    results: dict[str, Any] = {
        "machine": facts,
        "settings": settings.model_dump(),
        "plan": {name: getattr(plan, name) for name in Plan.__slots__},
        "models": {},
    }
    for name in models or RANDOM_MODELS:
        figures = _measure(name, settings, plan, peer, facts["threads"])
        results["models"][Path(name).name] = figures
        _show(name, plan, figures)
        if json_path is not None:
            write_json(json_path, results)


def _peer(wanted: str) -> str | None:
    if wanted == "none":
        return None
    try:
        find_program(PROGRAM)
    except SettingsError:
        if wanted == PROGRAM:
            raise
        logger.info("%s is not installed, so there is no peer", PROGRAM)
        return None
    return PROGRAM


def _measure(
    name: str, settings: EngineOptions, plan: Plan, peer: str | None, threads: int
) -> dict[str, Any]:
    with TemporaryDirectory() as scratch, ExitStack() as servers:
        folder = model_folder(name, Path(scratch))
        config = load_config(folder)
        given = settings.model_dump(exclude_unset=True)
        own, _ = servers.enter_context(dape_server(folder, {"max_num_seqs": plan.streams, **given}))
        urls = {OWN: own}
        if peer is not None:
            # A line for every file that the peer's model is made of would bury the progress.
            logging.getLogger("gguf").setLevel(logging.WARNING)
            context = plan.prompt_tokens + plan.output_tokens
            urls[peer] = servers.enter_context(
                llama_server(config, Path(scratch), threads, plan.streams, context)
            )
        prompts = Prompts(config.vocab_size)
        logger.info("%s: %d streams", name, plan.streams)
        engine = servers.enter_context(EngineProcess(folder, settings))
        rounds, alone = measure_streams(urls, engine, prompts, plan)
        figures = summary(rounds, alone, OWN, peer)
        logger.info("%s: scoring", name)
        figures["scored_tokens_per_s"] = measure_scoring(own, prompts, plan)
    return figures


def _show(name: str, plan: Plan, figures: dict[str, Any]) -> None:
    peer = figures.get("peer")
    title = f"{name}: {plan.streams} streams, {plan.prompt_tokens} tokens in, {plan.output_tokens} out"
    table = Table("what", title=title)
    for column in (OWN, *((peer["name"], "ratio") if peer else ())):
        table.add_column(column, justify="right")
    for key, value in figures["streaming"].items():
        cells = [_number(value)]
        if peer and key in peer["streaming"]:
            over = peer["own_over_peer"].get(key)
            cells += [_number(peer["streaming"][key]), "" if over is None else f"{over:.2f}"]
        table.add_row(LABELS[key], *cells)
    table.add_row("the engine alone, tokens/s", _number(figures["engine_alone_tokens_per_s"]))
    table.add_row("over HTTP / alone", _number(figures["http_over_engine_alone"]))
    for length, speed in figures["scored_tokens_per_s"].items():
        table.add_row(f"scoring {length} tokens, tokens/s", _number(speed))
    Console().print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
