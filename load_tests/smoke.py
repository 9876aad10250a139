"""`make load-test`: two minutes of five scenarios against a server that this starts with the shipped model.

Fails (exit code 1) on any failed request and on any broken objective of objectives.yaml. The server runs few
requests at once and lets few wait, so that the spike goes beyond what it takes. `--soak MINUTES` looks for
leaks instead: its server has a small cache, which is soon full and evicts from then on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from dape_engine.errors import DapeError
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_load.objectives import Verdict, judge, load_objectives
from dape_load.phases import Load, run_phase
from dape_load.report import show, write_html
from dape_load.target import find_target
from dape_load.workload import Sizes
from dape_server.cli.report import write_json
from dape_server.load.process import dape_server

OBJECTIVES = Path(__file__).with_name("objectives.yaml")
SERVER = {"max_num_seqs": 8, "max_num_queued_reqs": 8}
# Short enough for two cores; the texts scored beside the streams have the full length.
SHORT = Sizes(prompt_tokens=64, output_tokens=32, chat_tokens=32, score_tokens=1024, long_tokens=2048)
FULL = Sizes(prompt_tokens=64, output_tokens=32, score_tokens=16384)
PHASES = {
    "streaming": Load(seconds=15, users=4, sizes=SHORT, goodput=(("ttft_ms", 1000), ("tpot_ms", 100))),
    "interference": Load(seconds=40, users=4, scorers=1, sizes=FULL),
    "mix": Load(seconds=30, users=4, sizes=SHORT),
    "spike": Load(seconds=24, users=4, lean=True, sizes=SHORT),
    "abort": Load(seconds=12, users=8, sizes=SHORT),
}
SOAK_CACHE = {"kv_cache_memory": 128 << 20}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--objectives", type=click.Path(dir_okay=False, path_type=Path), default=OBJECTIVES)
@click.option("--phases", default=",".join(PHASES), help="Which ones to run.")
@click.option(
    "--soak",
    type=click.FloatRange(1),
    metavar="MINUTES",
    help="Instead of them a steady load for so long, in search of leaks: see `soak` in objectives.yaml.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page.")
def main(
    objectives: Path, phases: str, soak: float | None, json_path: Path | None, html: Path | None
) -> None:
    """Start a server with the shipped model, run the phases and judge them."""
    bounds = load_objectives(objectives)
    chosen = {name: PHASES[name] for name in PHASES if name in phases.split(",")}
    if soak is not None:
        chosen = {"soak": Load(seconds=60 * soak, users=4, sizes=SHORT)}
    results: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, list[Verdict]] = {}
    # Its choice for one machine: the load generator needs a core from time to time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings = SERVER if soak is None else {**SERVER, **SOAK_CACHE}
    with dape_server(resolve_model(DEFAULT_MODEL), settings) as (url, pid):
        target = find_target(url, pid=pid)
        for name, load in chosen.items():
            result = results[name] = run_phase(name, target, load)
            figures = {**result["figures"], "extra": result["extra"]}
            verdicts[name] = judge(bounds.get(name, {}), figures)
            show(name, result, verdicts[name])
    if json_path is not None:
        write_json(json_path, results)
    if html is not None:
        write_html(html, results, verdicts)
    failed = sum(result["figures"]["all"]["failed"] for result in results.values())
    broken = sum(not verdict.met for phase in verdicts.values() for verdict in phase)
    click.echo(f"{failed} failed requests, {broken} broken objectives")
    sys.exit(1 if failed or broken else 0)


if __name__ == "__main__":
    try:
        main()
    except DapeError as error:
        click.echo(f"load test: {error.message}", err=True)
        sys.exit(2)
