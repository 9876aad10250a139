"""Runs one scenario against a server and returns its figures by kind of request.

Closed loops go through locust, in a process of its own, or through the lean client, whose own cost is small
enough for inter-token times of a millisecond. Open loops go through the lean client.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dape_engine.errors import SettingsError
from dape_load.target import Target
from dape_load.watch import free_blocks, growth, sampled
from dape_load.workload import CHAT, MIX, SCORING, SPIKE, STEADY, STREAMING, Sizes
from dape_server.load.client import Request
from dape_server.load.figures import summarise
from dape_server.load.loops import closed_loop, open_loop, poisson_arrivals
from dape_server.load.records import Record

FOLDER = Path(__file__).resolve().parents[1]
STOP_SECONDS = 300
"""Given to requests under way when the time is over."""
MIXTURES: dict[str, Mapping[str, int]] = {
    "streaming": STREAMING,
    "perplexity": SCORING,
    "mix": MIX,
    "spike": CHAT,
    "abort": STREAMING,
    "soak": STEADY,
}
DEFAULT_SIZES = Sizes()
CLOSED = frozenset({"spike", "abort", "interference"})
"""Scenarios without an open loop."""
RECOVERY_SECONDS = 5
SAMPLES, MOST_SECONDS = 120, 5.0
"""Samples of a soak: at least so many, and so far apart at the most."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much load is put on a server."""

    seconds: float = 60
    users: int = 4
    """Of a closed loop."""
    rate: float | None = None
    """Requests per second of an open loop, with Poisson arrivals; None: a closed loop."""
    lean: bool = False
    """Closed loops by the lean client instead of locust."""
    scorers: int = 1
    """Users that score beside the streaming ones, in the scenario interference."""
    sizes: Sizes = DEFAULT_SIZES
    seed: int = 0
    goodput: tuple[tuple[str, float], ...] = ()
    """Objectives of a good request: ttft_ms, tpot_ms, e2e_ms."""
    locust_html: Path | None = None
    """For locust's own report."""


def run_phase(scenario: str, target: Target, load: Load) -> dict[str, Any]:
    """Return the settings and figures of one run.

    Raises:
        SettingsError: the load generator cannot run, or nothing was sent.
    """
    special: dict[str, Callable[[Target, Load], tuple[list[Record], dict[str, Any]]]] = {
        "interference": _interference,
        "spike": _spike,
        "abort": _abort,
        "soak": _soak,
    }
    if scenario in special:
        records, extra = special[scenario](target, load)
    else:
        records, extra = _generate(scenario, target, load), {}
    if not records:
        raise SettingsError(f"{scenario}: no request has ended within {load.seconds:g} s")
    kinds = sorted({record.kind for record in records})
    objectives = dict(load.goodput)
    figures = {
        kind: summarise([record for record in records if record.kind == kind], objectives) for kind in kinds
    }
    figures["all"] = summarise(records, objectives)
    over_time = extra.pop("over_time", [])
    troubles = sorted({record.error for record in records if record.failed and record.error})
    settings = {**asdict(load), "model": target.model, "loop": _loop(scenario, load)}
    del settings["locust_html"]
    return {
        "scenario": scenario,
        "settings": settings,
        "figures": figures,
        "extra": extra,
        "over_time": over_time,
        "errors": troubles[:10],
    }


def _loop(scenario: str, load: Load) -> str:
    lean = (load.lean and scenario != "abort") or scenario == "interference"
    loop = f"closed, {load.users} users, {'lean client' if lean else 'locust'}"
    if load.rate is not None:
        loop = f"open, {load.rate:g} requests/s on average, Poisson arrivals, lean client"
    limits = " and ".join(f"{name} of at most {limit:g}" for name, limit in load.goodput)
    return f"{loop}; good: {limits}" if limits else loop


def _generate(scenario: str, target: Target, load: Load) -> list[Record]:
    kinds = MIXTURES[scenario]
    workload = target.workload(load.sizes, load.seed)
    if load.rate is not None:
        arrivals = poisson_arrivals(load.rate, load.seconds, load.seed)
        # Drawn beforehand, so that making a long text delays no arrival.
        requests = [workload.draw(kinds) for _ in arrivals]
        return asyncio.run(open_loop(target.url, arrivals, iter(requests), api_key=target.api_key))
    if load.lean:
        users = [workload.endless(kinds) for _ in range(load.users)]
        return _closed(target, users, load.seconds)
    return run_locust(scenario, target, load)


def _closed(target: Target, users: Sequence[Iterable[Request]], seconds: float) -> list[Record]:
    return asyncio.run(closed_loop(target.url, users, api_key=target.api_key, seconds=seconds))


def _interference(target: Target, load: Load) -> tuple[list[Record], dict[str, Any]]:
    """Stream alone for half of the time, then beside users that score long texts."""
    workload = target.workload(load.sizes, load.seed)

    def streaming() -> list[Iterable[Request]]:
        return [workload.endless(STREAMING) for _ in range(load.users)]

    alone = _closed(target, streaming(), load.seconds / 2)
    scorers = [workload.endless(SCORING) for _ in range(load.scorers)]
    both = _closed(target, [*streaming(), *scorers], load.seconds / 2)
    beside = [record for record in both if record.kind == "stream"]
    without, within = (summarise(records).get("itl_ms", {}).get("p99") for records in (alone, beside))
    extra = {}
    if without is not None and within is not None:
        extra = {"itl_p99_ratio": within / without, "itl_p99_above_twice_ms": within - 2 * without}
    named = [replace(record, kind="stream alone") for record in alone]
    named += [
        replace(record, kind="stream beside scoring") if record.kind == "stream" else record
        for record in both
    ]
    return named, extra


def _spike(target: Target, load: Load) -> tuple[list[Record], dict[str, Any]]:
    """Ten times the users for the middle third of the time."""
    third = load.seconds / 3
    if load.lean:
        workload = target.workload(load.sizes, load.seed)
        records = []
        for users in (load.users, SPIKE * load.users, load.users):
            records += _closed(target, [workload.endless(CHAT) for _ in range(users)], third)
    else:
        options = {"--spike-after": f"{third:g}", "--spike-seconds": f"{third:g}"}
        records = run_locust("spike", target, load, options)
    begin = min((record.sent for record in records), default=0.0)
    later = [record for record in records if record.sent - begin > 2 * third + RECOVERY_SECONDS]
    refusals = [record for record in records if record.refused]
    extra: dict[str, Any] = {
        "refused_after_recovery": sum(record.refused for record in later),
        "refused_without_retry_after": sum(not (record.retry_after or "").isdigit() for record in refusals),
    }
    if ttft := summarise(later).get("ttft_ms"):
        extra["ttft_p95_after_recovery_ms"] = ttft["p95"]
    return records, extra


def _abort(target: Target, load: Load) -> tuple[list[Record], dict[str, Any]]:
    """Let half of the users hang up, then look for cache blocks that nobody has given back."""
    before = free_blocks(target)
    records = run_locust("abort", target, load)
    return records, _leaked(target, before)


def _soak(target: Target, load: Load) -> tuple[list[Record], dict[str, Any]]:
    """Look for whatever grows under a steady load."""
    before = free_blocks(target)
    with sampled(target, min(load.seconds / SAMPLES, MOST_SECONDS)) as samples:
        records = _generate("soak", target, load)
    return records, {**growth(samples), **_leaked(target, before), "over_time": samples}


def _leaked(target: Target, before: int | None) -> dict[str, Any]:
    """Return the free cache blocks of an idle server and how many are missing since `before`."""
    after = free_blocks(target)
    if before is None or after is None:
        return {}
    return {"free_blocks_before": before, "free_blocks_after": after, "leaked_blocks": before - after}


def run_locust(
    scenario: str, target: Target, load: Load, options: Mapping[str, str] | None = None
) -> list[Record]:
    """Run a file of `scenarios/` in locust without its page, and return the records.

    Raises:
        SettingsError: locust is not installed, or has ended before its time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "records.json"
        given = {
            "--host": target.url,
            "--users": str(load.users),
            "--spawn-rate": str(load.users),
            "--run-time": f"{max(1, round(load.seconds))}s",
            "--stop-timeout": str(STOP_SECONDS),
            "--exit-code-on-error": "0",
            "--records": str(path),
            "--model": target.model,
            "--score-route": target.score_route,
            "--seed": str(load.seed),
            **{"--" + name.replace("_", "-"): str(value) for name, value in asdict(load.sizes).items()},
            **(options or {}),
        }
        if load.locust_html is not None:
            given["--html"] = str(load.locust_html)
        command = [sys.executable, "-m", "locust", "-f", str(FOLDER / "scenarios" / f"{scenario}.py")]
        command += ["--headless", "--only-summary", "--skip-log-setup"]
        command += [part for option in given.items() for part in option]
        search = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": search}
        if target.api_key is not None:
            environment["LOAD_API_KEY"] = target.api_key  # not seen in the list of processes
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode or not path.exists():
            last = " | ".join((run.stderr or run.stdout).strip().splitlines()[-3:])
            raise SettingsError(f"locust ended with exit code {run.returncode}: {last}")
        return [Record(**entry) for entry in json.loads(path.read_text())]
