"""Tokens per second with speculative decoding over those without, on repetitive texts and on prose.

    python benchmarks/speculation.py [MODEL] [--streams 1,4,16] [--tokens 128] [--repeats 5] [--json FILE]

Both ways take turns in one engine, and every figure is the median of the ratios within the rounds. Streams
begin together on prompts that the prefix cache holds; time runs from the first stream's first token on. The
texts: a table and a program, each given twice and begun once more (greedy), and the openings of stories
(drawn with seeds at temperature 0.8, so that no model falls into a loop). MODEL is a folder, a shipped model,
or "small" or "125m", which have random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from dape_engine.bench.script import integers, run_script, script_parser
from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_engine.request import GenerationRequest, RequestStats, SamplingParams, StepStats
from dape_engine.speculation import SpeculativeConfig
from dape_kernels.bench.timing import ratio

NAMES = ["Mary Wood", "John Hill", "Anna Price", "Peter Grey", "Ruth Marsh", "Henry Lane", "Jane Stone"]
PLACES = ["the mill", "the old church", "the harbour", "the market", "the school", "the station"]
OPENINGS = [
    "It had rained since the early morning, and when the coach at last came round the corner of the road",
    "My uncle was a man who had seen much of the world, but he never spoke of it, and when we asked him",
    "The captain looked long at the sea before he answered, and then he said that no ship of his would",
    "She opened the letter with some impatience, for it was the third that week, and read that her brother",
    "There stood at the end of the village a house in which nobody had lived for more than twenty years",
    "The professor put down his glass, looked at each of us in turn and began to tell what he had found",
    "On the evening of the second day they came to a river which was too wide to be crossed without a boat",
    "He was not a rich man, nor had he ever wished to be one, and yet the news of the money pleased him",
]


def table(seed: int) -> str:
    """Return the lines of a table with other numbers for every seed."""
    rows = [
        f"{name} lives near {PLACES[(row + seed) % len(PLACES)]}, "
        f"was born in {1801 + (37 * row + 13 * seed) % 90} and owns {2 + (5 * row + 3 * seed) % 17} horses.\n"
        for row, name in enumerate(NAMES)
    ]
    return "".join(rows)


def program(seed: int) -> str:
    """Return a part of this program, another one for every seed."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    first = 60 + 3 * seed
    return "".join(lines[first : first + 14])


def prompts(kind: str, streams: int) -> list[str]:
    """Return one text per stream."""
    if kind == "prose":
        return [OPENINGS[index % len(OPENINGS)] for index in range(streams)]
    make = table if kind == "table" else program
    return [make(index) * 2 + make(index)[:20] for index in range(streams)]


class Counts:
    """What was proposed and accepted."""

    def __init__(self) -> None:
        self.proposed = self.accepted = 0

    def on_step(self, stats: StepStats) -> None:
        """Count the proposals of one step."""
        self.proposed += sum(proposed for proposed, _ in stats.drafts)
        self.accepted += sum(accepted for _, accepted in stats.drafts)

    def on_finished(self, stats: RequestStats) -> None:
        """Requests are not looked at."""


async def speed(engine: AsyncEngine, kind: str, streams: int, tokens: int, *, speculates: bool) -> float:
    """Return tokens per second over all streams."""
    speculation = SpeculativeConfig() if speculates else SpeculativeConfig(num_speculative_tokens=0)
    first = 0.0

    async def stream(index: int, text: str) -> None:
        nonlocal first
        sampling = SamplingParams(
            max_tokens=tokens, temperature=0.8 if kind == "prose" else 0.0, seed=index, ignore_eos=True
        )
        prompt = tuple(engine.tokenizer.encode(text))
        async for _ in engine.generate(GenerationRequest("r", prompt, sampling, speculation=speculation)):
            first = first or time.perf_counter()

    await asyncio.gather(*(stream(index, text) for index, text in enumerate(prompts(kind, streams))))
    return streams * tokens / (time.perf_counter() - first)


async def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures by kind of text and number of streams."""
    counts = Counts()
    engine = AsyncEngine(folder, EngineOptions(), counts)
    engine.start()
    figures: dict[str, Any] = {}
    for kind in ("table", "program", "prose"):
        for streams in arguments.streams:
            speeds: dict[bool, list[float]] = {False: [], True: []}
            for round_ in range(arguments.repeats + 1):
                if round_ == 1:
                    counts.proposed = counts.accepted = 0
                for speculates, taken in speeds.items():
                    one = await speed(engine, kind, streams, arguments.tokens, speculates=speculates)
                    if round_:  # the first one fills the prefix cache
                        taken.append(one)
            figures[f"{kind} x {streams}"] = one_case = {
                "plain_tokens_per_second": round(statistics.median(speeds[False]), 1),
                "speculative_over_plain": round(ratio(speeds[True], speeds[False]), 3),
                "proposed_per_token": round(
                    counts.proposed / (streams * arguments.tokens * arguments.repeats), 3
                ),
                "accepted_per_proposed": round(counts.accepted / max(counts.proposed, 1), 3),
            }
            shown = ", ".join(f"{name} {value}" for name, value in one_case.items())
            sys.stdout.write(f"{kind:8} x {streams:2}: {shown}\n")
    await engine.shutdown(0)
    return figures


def main() -> None:
    """Measure and print."""
    parser = script_parser(__doc__)
    parser.add_argument("--streams", type=integers, default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=128)
    run_script(parser, measure)


if __name__ == "__main__":
    main()
