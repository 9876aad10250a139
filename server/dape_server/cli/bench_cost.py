"""`dape bench cost`: prefill time of a static encoding and of DAPE at the paper's model sizes."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console

from dape_engine.bench.cost import SIZES, CostPlan, measure_costs
from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_kernels.bench.machine import machine
from dape_server.cli.options import build_settings, config_option, settings_options
from dape_server.cli.report import parse_lengths, write_json

PLAN = CostPlan()


@click.command()
@click.argument("sizes", nargs=-1, metavar="[SIZE...]")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the numbers; those that the file holds already are not measured again.",
)
@click.option("--lengths", default=",".join(map(str, PLAN.lengths)), show_default=True, help="Prompts.")
@click.option(
    "--layers",
    type=click.IntRange(1),
    default=PLAN.layers,
    show_default=True,
    help="Layers that are measured; times are scaled to all layers of the size.",
)
@click.option(
    "--plain-up-to",
    type=click.IntRange(0),
    default=PLAN.plain_up_to,
    show_default=True,
    help="Longest prompt for plain PyTorch, whose memory grows with the square of the length.",
)
@click.option("--repeats", type=click.IntRange(1), default=PLAN.repeats, show_default=True, help="Rounds.")
@config_option
@settings_options(EngineOptions)
def cost(sizes: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Measure what DAPE adds to the prefill time of each SIZE: 350m, 2.7b, 6.7b; without any, all of them.

    Kerple and DAPE-Kerple models with random weights take turns, and with them DAPE in plain PyTorch.
    """
    for name in sizes:
        if name not in SIZES:
            raise SettingsError(f"unknown size {name}, expected one of {', '.join(SIZES)}")
    settings = build_settings(EngineOptions, options)
    plan = CostPlan(
        tuple(parse_lengths(options["lengths"])),
        options["layers"],
        options["plain_up_to"],
        options["repeats"],
    )
    facts = machine()
    facts["threads"] = settings.threads or facts["threads"]
    circumstances = {
        "machine": facts,
        "settings": settings.model_dump(exclude={"kv_cache_memory"}),
        "measured_layers": plan.layers,
    }
    results = _begun(json_path, circumstances)
    for name in sizes or SIZES:
        costs: dict[str, Any] = results["sizes"].setdefault(name, {"layers": SIZES[name].layers, "costs": {}})
        missing = tuple(length for length in plan.lengths if str(length) not in costs["costs"])
        with TemporaryDirectory() as scratch:
            for length, figures in measure_costs(name, plan, settings, missing, Path(scratch)):
                costs["costs"][str(length)] = figures
                Console().print(f"{name}, {length} tokens: {_line(figures)}")
                if json_path is not None:
                    write_json(json_path, results)


def _begun(path: Path | None, circumstances: dict[str, Any]) -> dict[str, Any]:
    """Return what the file holds, to be gone on with.

    Raises:
        SettingsError: it was made under other circumstances.
    """
    if path is None or not path.exists():
        return {**circumstances, "sizes": {}}
    results: dict[str, Any] = json.loads(path.read_text())
    for name, value in circumstances.items():
        if results.get(name) != value:
            raise SettingsError(f"--json {path} was made under another {name}; remove it or name another")
    return results


def _line(figures: dict[str, float]) -> str:
    times = ", ".join(f"{name} {value:.2f} ms" for name, value in figures.items() if "over" not in name)
    ratios = ", ".join(
        f"{name.replace('_', ' ')} {value:.2f}" for name, value in figures.items() if "over" in name
    )
    return f"{times} a token; {ratios}"
