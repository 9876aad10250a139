"""Tokens per second of scoring with alternatives beside each token, over those without.

    python benchmarks/scoring.py [MODEL] [--tops 0,1,2,5] [--length 512] [--texts 8]
        [--repeats 5] [--json FILE]

One alternative is what lm-eval asks for. Every number of alternatives takes its turn in one engine, on random
texts that no cached prefix matches, all of them asked for at once; every figure is the median of the ratios
within the rounds. MODEL is a folder, a shipped model, or "small" or "125m", which have random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch

from dape_engine.bench.script import integers, run_script, script_parser
from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_engine.request import ScoreRequest, Window
from dape_kernels.bench.timing import ratio


async def speed(engine: AsyncEngine, top: int, texts: torch.Tensor) -> float:
    """Return scored tokens per second of texts, token ids [texts, length], with `top` alternatives."""

    async def score(text: list[int]) -> None:
        request = ScoreRequest("r", tuple(text), (Window(0, len(text), 1),), top)
        async for _ in engine.score(request):
            pass

    started = time.perf_counter()
    await asyncio.gather(*(score(text) for text in texts.tolist()))
    return texts.numel() / (time.perf_counter() - started)


async def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures by number of alternatives."""
    engine = AsyncEngine(folder, EngineOptions())
    engine.start()
    seeds = count()
    speeds: dict[int, list[float]] = {top: [] for top in arguments.tops}
    for round_ in range(arguments.repeats + 1):
        for top, taken in speeds.items():
            generator = torch.Generator().manual_seed(next(seeds))
            shape = (arguments.texts, arguments.length)
            texts = torch.randint(1, engine.tokenizer.vocab_size, shape, generator=generator)
            one = await speed(engine, top, texts)
            if round_:  # the first one warms up
                taken.append(one)
    await engine.shutdown(0)
    figures = {}
    for top, taken in speeds.items():
        figures[str(top)] = {
            "tokens_per_second": round(statistics.median(taken), 1),
            f"over_top_{arguments.tops[0]}": round(ratio(taken, speeds[arguments.tops[0]]), 3),
        }
        shown = ", ".join(f"{name} {value}" for name, value in figures[str(top)].items())
        sys.stdout.write(f"top {top}: {shown}\n")
    return figures


def main() -> None:
    """Measure and print."""
    parser = script_parser(__doc__)
    parser.add_argument("--tops", type=integers, default=[0, 1, 2, 5])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--texts", type=int, default=8)
    run_script(parser, measure)


if __name__ == "__main__":
    main()
