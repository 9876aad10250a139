"""What DAPE costs at the sizes of its paper: prefill with a static encoding, DAPE, and DAPE in plain PyTorch.

Models have random weights, as few layers as asked for, a small vocabulary, and else the sizes' own shape:
layers are equal, so the time of the whole model is that of the measured layers, scaled.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from dape_engine.bench import tasks
from dape_engine.bench.measure import WARM_UP_SEED, WARM_UP_TOKENS, Plan, rounds, with_room
from dape_engine.bench.models import write_shape
from dape_engine.bench.process import EngineProcess
from dape_engine.options import EngineOptions
from dape_kernels.bench.timing import ratio

# Holds the shipped tokenizer; a prompt's last token is all that meets it.
VOCABULARY = 8192
STATIC, DAPE, PLAIN = "static", "dape", "plain"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a model of the paper (configs/dape-kerple-*.yaml)."""

    hidden: int
    layers: int
    heads: int


SIZES = {"350m": Size(1024, 24, 16), "2.7b": Size(2560, 32, 32), "6.7b": Size(4096, 32, 32)}


@dataclass(frozen=True, slots=True)
class CostPlan:
    """What to measure of each size."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    layers: int = 1
    """Layers that are measured."""
    plain_up_to: int = 2048
    """The longest prompt for the plain form, whose memory grows with the square of the length."""
    repeats: int = 3


Cost = dict[str, float]
"""Milliseconds a token of the whole model by contestant, and `dape_over_static`, `plain_over_dape`."""


def measure_costs(
    name: str, plan: CostPlan, options: EngineOptions, lengths: tuple[int, ...], scratch: Path
) -> Iterator[tuple[int, Cost]]:
    """Yield the costs of a size at each length; the contestants take turns.

    Args:
        name: one of `SIZES`.
        plan: how many layers and rounds, and how far the plain form goes.
        options: of the engines.
        lengths: those of the plan that are wanted.
        scratch: folder for the models.

    Raises:
        SettingsError: an engine cannot be made or fails.
    """
    size = SIZES[name]
    folders = {
        kind: write_shape(
            scratch / f"{name}-{kind}", size.hidden, plan.layers, size.heads, VOCABULARY, dape=kind != STATIC
        )
        for kind in (STATIC, DAPE)
    }
    folders[PLAIN] = folders[DAPE]
    seeds = count()
    for length in lengths:
        kinds = (STATIC, DAPE, PLAIN) if length <= plan.plain_up_to else (STATIC, DAPE)
        logger.info("%s: %d tokens", name, length)
        with ExitStack() as stack:
            contestants: dict[str, Callable[[], float]] = {}
            for kind in kinds:
                own = with_room(folders[kind], options, length + WARM_UP_TOKENS)
                if kind == PLAIN:
                    own = own.model_copy(update={"attention_backend": "reference"})
                engine = stack.enter_context(EngineProcess(folders[kind], own))
                engine.run(tasks.prefill, WARM_UP_TOKENS, WARM_UP_SEED)
                contestants[kind] = partial(_prefill, engine, length, seeds)
            speeds = rounds(contestants, Plan(repeats=plan.repeats))
        taken = {kind: speeds[kind, False] for kind in kinds}
        scale = 1000 * size.layers / plan.layers
        cost = {kind: scale / statistics.median(speed) for kind, speed in taken.items()}
        cost["dape_over_static"] = ratio(taken[STATIC], taken[DAPE])
        if PLAIN in taken:
            cost["plain_over_dape"] = ratio(taken[DAPE], taken[PLAIN])
        yield length, cost


def _prefill(engine: EngineProcess, length: int, seeds: Iterator[int]) -> float:
    return engine.run(tasks.prefill, length, next(seeds))
