"""Load test of any OpenAI-style server: `python load_tests/run.py --scenario streaming --users 16`.

Exit code 0: every request was answered or refused in good order and every objective was met; 1: not so; 2: a
mistake in the options.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dape_engine.errors import DapeError, SettingsError
from dape_load.objectives import Objectives, judge, load_objectives
from dape_load.phases import CLOSED, MIXTURES, Load, run_phase
from dape_load.report import show, write_html
from dape_load.target import find_target
from dape_load.workload import COMPLETIONS, PERPLEXITY, Sizes
from dape_server.cli.report import write_json

LOAD, SIZES = Load(), Sizes()
GOODPUT = ("ttft_ms", "tpot_ms", "e2e_ms")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--scenario", type=click.Choice([*MIXTURES, "interference"]), default="mix")
@click.option("--host", default="http://127.0.0.1:8000", help="Address of the server.")
@click.option("--model", help="Name in the requests. [default: the first that the server names]")
@click.option("--api-key", envvar="LOAD_API_KEY", help="Sent as a bearer token.")
@click.option("--duration", type=click.FloatRange(1), default=LOAD.seconds, help="Seconds.")
@click.option("--users", type=click.IntRange(1), default=LOAD.users, help="Of a closed loop.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Open loop: requests per second.")
@click.option(
    "--client",
    type=click.Choice(["locust", "lean"]),
    default="locust",
    help="Who runs a closed loop: locust, or the lean client, for times that locust's own cost would hide.",
)
@click.option("--scorers", type=click.IntRange(1), default=LOAD.scorers, help="Of interference.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=SIZES.prompt_tokens, help="Of a stream.")
@click.option("--output-tokens", type=click.IntRange(1), default=SIZES.output_tokens)
@click.option("--chat-tokens", type=click.IntRange(1), default=SIZES.chat_tokens, help="Prompt of a chat.")
@click.option("--score-tokens", type=click.IntRange(2), default=SIZES.score_tokens, help="Of a scored text.")
@click.option(
    "--long-tokens", type=click.IntRange(2), default=SIZES.long_tokens, help="Long prompt and its completion."
)
@click.option(
    "--score-route",
    type=click.Choice([PERPLEXITY, COMPLETIONS]),
    default=PERPLEXITY,
    help="The second, with echo, for servers without the first.",
)
@click.option("--goodput", default="", metavar="NAME=MS,...", help=f"A good request: {', '.join(GOODPUT)}.")
@click.option("--pid", type=int, help="Of the server, where it runs here: a soak reads its memory exactly.")
@click.option("--seed", type=click.IntRange(0), default=LOAD.seed, help="Of texts and arrivals.")
@click.option(
    "--objectives", type=click.Path(dir_okay=False, path_type=Path), help="YAML; see objectives.yaml."
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page; locust's own goes beside it, with -locust in its name.",
)
def main(scenario: str, html: Path | None, json_path: Path | None, **options: Any) -> None:
    """Put a load on a server and print what its clients saw."""
    objectives: Objectives = load_objectives(options["objectives"]) if options["objectives"] else {}
    if scenario in CLOSED and options["rate"] is not None:
        raise SettingsError(f"--rate {options['rate']:g}: the scenario {scenario} has no open loop")
    lean = options["client"] == "lean"
    if scenario == "abort" and lean:
        raise SettingsError("--client lean: the scenario abort needs locust")
    target = find_target(
        options["host"], options["model"], options["api_key"], options["score_route"], options["pid"]
    )
    load = Load(
        options["duration"],
        options["users"],
        options["rate"],
        lean,
        options["scorers"],
        Sizes(**{name: options[name] for name in Sizes.__slots__}),
        options["seed"],
        parse_goodput(options["goodput"]),
        html.with_name(f"{html.stem}-locust.html") if html else None,
    )
    result = run_phase(scenario, target, load)
    verdicts = judge(objectives.get(scenario, {}), {**result["figures"], "extra": result["extra"]})
    show(scenario, result, verdicts)
    if json_path is not None:
        write_json(json_path, {scenario: result})
    if html is not None:
        write_html(html, {scenario: result}, {scenario: verdicts})
    sys.exit(0 if result["figures"]["all"]["failed"] == 0 and all(v.met for v in verdicts) else 1)


def parse_goodput(text: str) -> tuple[tuple[str, float], ...]:
    """Return the limits of "ttft_ms=200,tpot_ms=50".

    Raises:
        SettingsError: an entry is something else.
    """
    limits = []
    for entry in filter(None, text.split(",")):
        name, _, limit = entry.partition("=")
        try:
            limits.append((name, float(limit)))
        except ValueError as error:
            raise SettingsError(f"--goodput {entry}: expected a name, = and milliseconds") from error
        if name not in GOODPUT:
            raise SettingsError(f"--goodput {name}: must be one of {', '.join(GOODPUT)}")
    return tuple(limits)


if __name__ == "__main__":
    try:
        main()
    except DapeError as error:
        click.echo(f"load test: {error.message}", err=True)
        sys.exit(2)
