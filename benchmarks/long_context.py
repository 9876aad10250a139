"""Prefill, decode and memory of the engine at long context, for the shipped model and a random 125M.

Run `python benchmarks/long_context.py [--json FILE]`. Every model runs in a process of its own, so that
peak memory is its own; figures are medians of repeated runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from dape_engine.config import ModelConfig
from dape_engine.engine import AsyncEngine
from dape_engine.model import DapeForCausalLM, initialise
from dape_engine.options import EngineOptions
from dape_engine.request import GenerationRequest, SamplingParams
from dape_engine.weights import DEFAULT_MODEL, resolve_model, save_model_folder

REPOSITORY = Path(__file__).resolve().parent.parent
PREFILL_LENGTHS = (512, 2048, 8192, 16384)
DECODE_STREAMS = (1, 8, 32)
DECODE_CONTEXTS = (128, 8192)
DECODE_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[DEFAULT_MODEL, "125m"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {"machine": machine(), "models": {}}
    for name in arguments.models:
        results["models"][name] = in_own_process(measure_model, name, arguments.repeats)
        show(name, results["models"][name])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """Describe the processor and the software."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def in_own_process(function: Any, *arguments: Any) -> Any:
    """Call a function in a fresh process and return what it returns."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def measure_model(name: str, repeats: int) -> dict[str, Any]:
    """Return all figures of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve_model(name) if name != "125m" else random_model(Path(scratch))
        return asyncio.run(measure(folder, repeats))


def random_model(folder: Path) -> Path:
    """Write a 125M DAPE-Kerple model with random weights."""
    settings = yaml.safe_load((REPOSITORY / "configs" / "dape-kerple-125m.yaml").read_text())["model"]
    model = DapeForCausalLM(ModelConfig.model_validate(settings))
    initialise(model)
    tokenizer = Tokenizer.from_file(str(resolve_model(DEFAULT_MODEL) / "tokenizer.json"))
    save_model_folder(folder, model, tokenizer)
    return folder


async def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Start an engine whose cache holds the largest batch and time prefill and decode."""
    config = json.loads((folder / "config.json").read_text())
    per_token = 2 * 4 * config["num_hidden_layers"] * config["hidden_size"]
    room = per_token * (max(PREFILL_LENGTHS) + 32 * 64)
    engine = AsyncEngine(folder, EngineOptions(kv_cache_memory=room))
    engine.start()
    figures: dict[str, Any] = {"prefill": {}, "decode": {}, "peak_rss_mib": {}, "cache_mib": room >> 20}
    for length in PREFILL_LENGTHS:
        with PeakMemory() as memory:
            times = [
                await prefill_seconds(engine, length, run) for run in range(repeats if length < 8192 else 1)
            ]
        figures["prefill"][length] = length / statistics.median(times)
        figures["peak_rss_mib"][length] = memory.peak >> 20
    for context in DECODE_CONTEXTS:
        for streams in DECODE_STREAMS:
            figures["decode"][f"{streams} x {context}"] = await decode_rate(engine, context, streams)
    await engine.shutdown(0)
    return figures


async def prefill_seconds(engine: AsyncEngine, length: int, seed: int) -> float:
    """Return the time to the first token of a random prompt that no cached prefix matches."""
    started = time.perf_counter()
    async for _ in engine.generate(request(engine, length, seed, 1)):
        return time.perf_counter() - started
    raise RuntimeError("no token came")


async def decode_rate(engine: AsyncEngine, context: int, streams: int) -> float:
    """Return tokens per second over all streams, while all of them decode.

    The streams share their prompt's blocks, so that it is prefilled once; every stream still reads all
    of it in every step.
    """
    async for _ in engine.generate(request(engine, context, 1000, 1)):
        pass
    stamps: list[float] = []

    async def stream(index: int) -> None:
        async for _ in engine.generate(request(engine, context, 1000, DECODE_TOKENS, index)):
            stamps.append(time.perf_counter())

    await asyncio.gather(*(stream(index) for index in range(streams)))
    steady = sorted(stamps)[streams - 1 :]
    return (len(steady) - 1) / (steady[-1] - steady[0])


def request(engine: AsyncEngine, length: int, seed: int, tokens: int, index: int = 0) -> GenerationRequest:
    """Return a random prompt that generates exactly `tokens` tokens."""
    generator = torch.Generator().manual_seed(seed * 100_003 + length)
    vocab = engine.tokenizer.vocab_size
    prompt = torch.randint(1, vocab, (length,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return GenerationRequest(f"bench-{seed}-{index}", tuple(prompt), sampling)


class PeakMemory:
    """The largest resident set of this process while the block runs, sampled every 10 ms."""

    def __enter__(self) -> PeakMemory:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.is_set():
            self.peak = max(self.peak, process.memory_info().rss)
            self._stop.wait(0.01)


def show(name: str, figures: dict[str, Any]) -> None:
    """Print one model's figures."""
    table = Table(title=f"{name} (KV cache {figures['cache_mib']} MiB)")
    for column in ("what", "value", "unit"):
        table.add_column(column)
    for length, rate in figures["prefill"].items():
        table.add_row(f"prefill {length}", f"{rate:.0f}", "tokens/s")
    for case, rate in figures["decode"].items():
        table.add_row(f"decode {case}", f"{rate:.1f}", "tokens/s")
    for length, peak in figures["peak_rss_mib"].items():
        table.add_row(f"peak RSS at {length}", str(peak), "MiB")
    Console().print(table)


if __name__ == "__main__":
    main()
