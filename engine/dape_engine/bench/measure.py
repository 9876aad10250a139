"""All figures of one model: rounds in which the engine and what it is compared with take turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from dape_engine.bench import tasks
from dape_engine.bench.llama_cpp import LlamaCpp
from dape_engine.bench.neighbour import busy_neighbour
from dape_engine.bench.process import EngineProcess
from dape_engine.options import EngineOptions
from dape_engine.weights import load_config
from dape_kernels.bench.timing import ratio

# Rounds of one figure end after this long: long prompts of large models are measured once.
ENOUGH_SECONDS = 60
WARM_UP_TOKENS, WARM_UP_SEED = 64, 999

ENGINE = "engine"
Progress = Callable[[str], None]
Speeds = dict[tuple[str, bool], list[float]]
"""Tokens per second in every round, by contestant and whether it had a busy neighbour."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    prefill_lengths: tuple[int, ...] = (512, 2048, 8192, 16384)
    decode_contexts: tuple[int, ...] = (128, 8192)
    decode_streams: tuple[int, ...] = (1, 8, 32)
    decode_tokens: int = 32
    """Tokens that each stream generates."""
    repeats: int = 3
    """Rounds, fewer where they take long."""
    busy_neighbour: bool = False
    """Whether to measure everything again beside a process that keeps one core busy."""


def measure_model(
    folder: Path, options: EngineOptions, plan: Plan, peer: LlamaCpp | None, progress: Progress
) -> dict[str, Any]:
    """Return the figures of a model by kind and case; speeds are tokens per second.

    Args:
        folder: of the model.
        options: of the engine; the size of the cache is set to what each measurement needs.
        plan: what to measure.
        peer: another engine to measure in turn with this one.
        progress: called with what is measured next.

    Raises:
        SettingsError: the options do not fit the model, or the peer fails.
    """
    figures: dict[str, Any] = {"peak_rss_mib": {}, "peak_rss_without_cache_mib": {}}
    speeds: dict[str, dict[str, Speeds]] = {"prefill": {}, "decode": {}}
    for length in plan.prefill_lengths:
        progress(f"prefill of {length}")
        taken, (peak, cache) = _measure_prefill(folder, options, length, plan, peer)
        speeds["prefill"][str(length)] = taken
        figures["peak_rss_mib"][str(length)] = peak >> 20
        figures["peak_rss_without_cache_mib"][str(length)] = (peak - cache) >> 20
    each = max(plan.decode_streams) * (plan.decode_tokens + 2 * options.block_size)
    with EngineProcess(folder, with_room(folder, options, max(plan.decode_contexts) + each)) as engine:
        figures["attention_backend"] = engine.run(tasks.backend_name)
        for context in plan.decode_contexts:
            for streams in plan.decode_streams:
                progress(f"decode of {streams} x {context}")
                case = (context, streams, plan.decode_tokens)
                contestants = {ENGINE: partial(engine.run, tasks.decode, *case)}
                if peer is not None:
                    contestants[peer.name] = partial(peer.decode, *case)
                speeds["decode"][f"{streams} x {context}"] = rounds(contestants, plan)
    return figures | summary(speeds, peer.name if peer is not None else None, plan.busy_neighbour)


def summary(
    speeds: Mapping[str, Mapping[str, Speeds]], peer: str | None, busy_neighbour: bool
) -> dict[str, Any]:
    """Return medians by kind and case; ratios are medians of the ratios within the rounds.

    Args:
        speeds: by kind ("prefill", "decode") and case.
        peer: the other contestant.
        busy_neighbour: whether there are speeds beside a busy neighbour.
    """

    def each(summarise: Callable[[Speeds], float]) -> dict[str, dict[str, float]]:
        return {kind: {case: summarise(s) for case, s in cases.items()} for kind, cases in speeds.items()}

    figures: dict[str, Any] = each(lambda taken: statistics.median(taken[ENGINE, False]))
    if peer is not None:
        figures["peer"] = {
            "name": peer,
            **each(lambda taken: statistics.median(taken[peer, False])),
            "engine_over_peer": each(lambda taken: ratio(taken[ENGINE, False], taken[peer, False])),
        }
    if busy_neighbour:
        names = [ENGINE] if peer is None else [ENGINE, peer]
        figures["slowdown_beside_busy_neighbour"] = {name: each(partial(_slowdown, name)) for name in names}
    return figures


def _slowdown(contestant: str, speeds: Speeds) -> float:
    return ratio(speeds[contestant, False], speeds[contestant, True])


def _measure_prefill(
    folder: Path, options: EngineOptions, length: int, plan: Plan, peer: LlamaCpp | None
) -> tuple[Speeds, tuple[int, int]]:
    """Return the speeds, and peak memory and cache of one prompt in bytes."""
    seeds = count()
    memory: list[tuple[int, int]] = []
    with EngineProcess(folder, with_room(folder, options, length + WARM_UP_TOKENS)) as engine:

        def prefill() -> float:
            speed = engine.run(tasks.prefill, length, next(seeds))
            memory.append(engine.run(tasks.memory, length))
            return speed

        engine.run(tasks.prefill, WARM_UP_TOKENS, WARM_UP_SEED)
        contestants: dict[str, Callable[[], float]] = {ENGINE: prefill}
        if peer is not None:
            contestants[peer.name] = partial(peer.prefill, length)
        speeds = rounds(contestants, plan)
    # Later prompts may fill further blocks of the cache.
    return speeds, memory[0]


def rounds(contestants: Mapping[str, Callable[[], float]], plan: Plan) -> Speeds:
    """Let the contestants take turns."""
    speeds: Speeds = defaultdict(list)
    started = time.monotonic()
    for _ in range(plan.repeats):
        for name, run in contestants.items():
            speeds[name, False].append(run())
            if plan.busy_neighbour:
                with busy_neighbour():
                    speeds[name, True].append(run())
        if time.monotonic() - started > ENOUGH_SECONDS:
            break
    return speeds


def with_room(folder: Path, options: EngineOptions, tokens: int) -> EngineOptions:
    """Return options with a cache for so many tokens, in float32 and with a head size padded to 16."""
    config = load_config(folder)
    padded = config.num_attention_heads * -(-config.head_dim // 16) * 16
    room = tokens * 2 * 4 * config.num_hidden_layers * padded
    return options.model_copy(update={"kv_cache_memory": ByteSize(room)})
