"""What many streaming clients see of a server, and what scoring over HTTP reaches: `dape bench serve`."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dape_engine.bench import tasks
from dape_engine.bench.process import EngineProcess
from dape_engine.errors import SettingsError
from dape_kernels.bench.timing import ratio
from dape_server.load.client import Request
from dape_server.load.figures import summarise
from dape_server.load.loops import closed_loop
from dape_server.load.records import Record
from dape_server.load.scrape import scrape

SHOWN = ("p50", "p95")
MODEL_SECONDS = "dape:engine_model_seconds_total"
STEP_SECONDS = "dape:engine_step_seconds_sum"
COMPARED = ("output_tokens_per_s", *(f"{kind}_{p}" for kind in ("ttft_ms", "itl_ms") for p in SHOWN))
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    streams: int = 16
    """Clients at once."""
    prompt_tokens: int = 128
    output_tokens: int = 64
    requests: int = 4
    """Of each client, one after another."""
    scored_lengths: tuple[int, ...] = (512, 2048)
    repeats: int = 3
    """Rounds."""


class Prompts:
    """Random prompts that no cached prefix matches.

    Args:
        vocabulary: ids are below it.
    """

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary
        self._random = random.Random(0)

    def take(self, length: int) -> list[int]:
        """Return token ids that were never returned before, as good as certainly."""
        return self._random.choices(range(1, self._vocabulary), k=length)


def measure_streams(
    servers: Mapping[str, str], engine: EngineProcess, prompts: Prompts, plan: Plan
) -> tuple[dict[str, list[Figures]], list[float]]:
    """Let the servers take turns; return the figures of every round by server, and the engine's alone.

    A closed loop: each client sends its next request when the one before has ended. The client's own use of
    the processor, in cores, is among the figures. The last list holds the tokens per second of the same
    requests without any HTTP.

    Args:
        servers: addresses by name.
        engine: with the model of this project's server.
        prompts: of the requests.
        plan: what to measure.

    Raises:
        SettingsError: a request has failed, or gave another number of tokens.
    """
    rounds: dict[str, list[Figures]] = {name: [] for name in servers}
    alone: list[float] = []
    for repeat in range(plan.repeats + 1):
        # The first round warms up and is not counted.
        requests = plan.requests if repeat else 1
        sizes = (plan.streams, requests, plan.prompt_tokens, plan.output_tokens)
        alone.append(engine.run(tasks.clients, *sizes, repeat))
        for name, url in servers.items():
            rounds[name].append(_streams(name, url, prompts, plan, requests))
    return {name: figures[1:] for name, figures in rounds.items()}, alone[1:]


def _streams(name: str, url: str, prompts: Prompts, plan: Plan, requests: int) -> Figures:
    body = {
        "max_tokens": plan.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    users = [
        [
            Request("stream", "/v1/completions", {**body, "prompt": prompts.take(plan.prompt_tokens)})
            for _ in range(requests)
        ]
        for _ in range(plan.streams)
    ]
    before = _engine_seconds(url)
    begun, busy = time.perf_counter(), time.process_time()
    records = asyncio.run(closed_loop(url, users))
    wall, busy = time.perf_counter() - begun, time.process_time() - busy
    after = _engine_seconds(url)
    _check(name, records, plan)
    whole = summarise(records)
    figures = {"output_tokens_per_s": whole["output_tokens_per_s"], "client_cores": busy / wall}
    figures["tokens_per_output"] = whole["tokens_per_output"]
    for kind in ("ttft_ms", "itl_ms"):
        figures |= {f"{kind}_{percentile}": whole[kind][percentile] for percentile in SHOWN}
    for share, metric in (("model_share", MODEL_SECONDS), ("step_share", STEP_SECONDS)):
        if metric in before:
            figures[share] = (after[metric] - before[metric]) / wall
    return figures


def _engine_seconds(url: str) -> dict[str, float]:
    """Return what the server says of its engine's time; nothing where it has no such metrics."""
    try:
        samples = scrape(url)
    except SettingsError:
        return {}
    return {name: samples[name] for name in (MODEL_SECONDS, STEP_SECONDS) if name in samples}


def _check(name: str, records: Sequence[Record], plan: Plan) -> None:
    for record in records:
        if not record.succeeded:
            raise SettingsError(f"{name}: a request has failed: {record.error or record.status}")
        if (record.prompt_tokens, record.output_tokens) != (plan.prompt_tokens, plan.output_tokens):
            raise SettingsError(
                f"{name}: counted {record.prompt_tokens} + {record.output_tokens} tokens, "
                f"expected {plan.prompt_tokens} + {plan.output_tokens}"
            )


def measure_scoring(url: str, prompts: Prompts, plan: Plan) -> Figures:
    """Return tokens per second of `/v1/perplexity`, one request at a time, by length.

    Raises:
        SettingsError: a request has failed.
    """
    speeds = {}
    for length in plan.scored_lengths:
        requests = [
            Request("score", "/v1/perplexity", {"input": prompts.take(length)})
            for _ in range(1 + plan.repeats)
        ]
        warm_up, *records = asyncio.run(closed_loop(url, [requests]))
        for record in (warm_up, *records):
            if not record.succeeded:
                raise SettingsError(f"scoring {length} tokens has failed: {record.error or record.status}")
        speeds[str(length)] = statistics.median(length / (record.ended - record.sent) for record in records)
    return speeds


def summary(
    rounds: Mapping[str, Sequence[Figures]], alone: Sequence[float], own: str, peer: str | None
) -> dict[str, Any]:
    """Return medians over the rounds; ratios are medians of the ratios within the rounds.

    Args:
        rounds: figures by server.
        alone: tokens per second of the engine without HTTP.
        own: this project's server.
        peer: the other one, if any.
    """
    speeds = [figures["output_tokens_per_s"] for figures in rounds[own]]
    figures: dict[str, Any] = {
        "streaming": _medians(rounds[own]),
        "engine_alone_tokens_per_s": statistics.median(alone),
        "http_over_engine_alone": ratio(speeds, alone),
    }
    if peer is not None:
        theirs = _medians(rounds[peer])
        figures["peer"] = {
            "name": peer,
            "streaming": theirs,
            "own_over_peer": {
                name: ratio([figures[name] for figures in rounds[own]], [f[name] for f in rounds[peer]])
                for name in theirs
                if name in COMPARED
            },
        }
    return figures


def _medians(rounds: Sequence[Figures]) -> Figures:
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
