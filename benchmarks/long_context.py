"""Prefill, decode and memory of the engine at long context, for the shipped model and a random 125M.

Run `python benchmarks/long_context.py [--json FILE]`. Every prompt length runs in a process of its own, so
that peak memory is its own. Prefill up to 2048 tokens is the median of repeated runs, longer ones are single.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
from dape_engine.weights import DEFAULT_MODEL, load_config, resolve_model, save_model_folder

REPOSITORY = Path(__file__).resolve().parent.parent
PREFILL_LENGTHS = (512, 2048, 8192, 16384)
DECODE_STREAMS = (1, 8, 32)
DECODE_CONTEXTS = (128, 8192)
DECODE_TOKENS = 16
RANDOM_MODEL = "125m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[DEFAULT_MODEL, RANDOM_MODEL])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {"machine": machine(), "models": {}}
    for name in arguments.models:
        results["models"][name] = measure_model(name, arguments.repeats)
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
    """Return all figures of one model; every prompt length and the decoding have a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve_model(name) if name != RANDOM_MODEL else random_model(Path(scratch))
        figures: dict[str, Any] = {"prefill": {}, "peak_rss_mib": {}, "peak_rss_without_cache_mib": {}}
        for length in PREFILL_LENGTHS:
            rate, peak = in_own_process(prefill, folder, length, repeats if length < 8192 else 1)
            figures["prefill"][length] = rate
            figures["peak_rss_mib"][length] = peak >> 20
            figures["peak_rss_without_cache_mib"][length] = (peak - cache_bytes(folder, length)) >> 20
        figures["decode"] = in_own_process(decode, folder)
        return figures


def random_model(folder: Path) -> Path:
    """Write a 125M DAPE-Kerple model with random weights."""
    settings = yaml.safe_load((REPOSITORY / "configs" / "dape-kerple-125m.yaml").read_text())["model"]
    model = DapeForCausalLM(ModelConfig.model_validate(settings))
    initialise(model)
    tokenizer = Tokenizer.from_file(str(resolve_model(DEFAULT_MODEL) / "tokenizer.json"))
    save_model_folder(folder, model, tokenizer)
    return folder


def cache_bytes(folder: Path, tokens: int) -> int:
    """Return the bytes of the float32 keys and values of `tokens` tokens."""
    config = load_config(folder)
    return tokens * 2 * 4 * config.num_hidden_layers * config.hidden_size


def prefill(folder: Path, length: int, repeats: int) -> tuple[float, int]:
    """Return tokens per second to the first token, and the process's peak resident set in bytes."""

    async def run() -> float:
        # Room for one prompt, so that repeated ones use the same memory.
        engine = AsyncEngine(folder, EngineOptions(kv_cache_memory=cache_bytes(folder, length + 16)))
        engine.start()
        times = [await prefill_seconds(engine, length, seed) for seed in range(repeats)]
        await engine.shutdown(0)
        return length / statistics.median(times)

    return asyncio.run(run()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decode(folder: Path) -> dict[str, float]:
    """Return tokens per second by number of streams and cached tokens."""

    async def run() -> dict[str, float]:
        room = cache_bytes(folder, max(DECODE_CONTEXTS) + max(DECODE_STREAMS) * 4 * DECODE_TOKENS)
        engine = AsyncEngine(folder, EngineOptions(kv_cache_memory=room))
        engine.start()
        figures = {
            f"{streams} x {context}": await decode_rate(engine, context, streams)
            for context in DECODE_CONTEXTS
            for streams in DECODE_STREAMS
        }
        await engine.shutdown(0)
        return figures

    return asyncio.run(run())


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


def show(name: str, figures: dict[str, Any]) -> None:
    """Print one model's figures."""
    table = Table("what", "value", "unit", title=name)
    for length, rate in figures["prefill"].items():
        table.add_row(f"prefill {length}", f"{rate:.0f}", "tokens/s")
    for case, rate in figures["decode"].items():
        table.add_row(f"decode {case}", f"{rate:.1f}", "tokens/s")
    for length, peak in figures["peak_rss_mib"].items():
        table.add_row(f"peak RSS at {length}", str(peak), "MiB")
    for length, peak in figures["peak_rss_without_cache_mib"].items():
        table.add_row(f"peak RSS less KV cache at {length}", str(peak), "MiB")
    Console().print(table)


if __name__ == "__main__":
    main()
