"""What models of the paper's sizes take to start and to answer, with bfloat16 and with int8 weights.

    python benchmarks/sizes.py SIZE... [--weights bfloat16,int8] [--stored] [--json FILE]
    python benchmarks/sizes.py SIZE --folder DIR

A SIZE is one of configs/dape-kerple-SIZE.yaml. Weights are random: made up in memory (`--load-format dummy`),
or with `--stored` written to a folder first, mapped from there, and only started. Activations and cache are
bfloat16. Engines have processes of their own; those of one size take turns where they fit the memory
together, and ratios are medians of the ratios within the rounds. Entries of the JSON file for other sizes
stay. `--folder` only writes DIR, for `dape serve DIR --load-format dummy`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer

from dape_engine.bench import tasks
from dape_engine.bench.measure import WARM_UP_SEED, WARM_UP_TOKENS, Plan, rounds
from dape_engine.bench.process import EngineProcess
from dape_engine.config import ModelConfig
from dape_engine.engine import AsyncEngine
from dape_engine.errors import DapeError, SettingsError
from dape_engine.loading import ModelLoader, load_model
from dape_engine.memory import DEFAULT_CPU_CACHE
from dape_engine.options import EngineOptions
from dape_engine.request import GenerationRequest, SamplingParams, ScoreRequest, Window
from dape_engine.tokenizer import FILE
from dape_engine.weights import DEFAULT_MODEL, resolve_model, save_model_folder, save_settings
from dape_kernels.bench.machine import machine
from dape_kernels.bench.timing import ratio
from dape_kernels.host import available_memory, peak_memory

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPT, CONTEXT, TOKENS = 512, 128, 16
LONG_PROMPT, LONG_ANSWER = 600, 64


def write_folder(size: str, folder: Path, *, stored: bool) -> Path:
    """Write a model folder of a size, with its weights if `stored`, and return it."""
    settings = yaml.safe_load((CONFIGS / f"dape-kerple-{size}.yaml").read_text(encoding="utf-8"))
    config = ModelConfig.model_validate(settings["model"])
    tokenizer = Tokenizer.from_file(str(resolve_model(DEFAULT_MODEL) / FILE))
    save_settings(folder, config, tokenizer)
    if stored:
        options = EngineOptions(load_format="dummy")
        save_model_folder(folder, load_model(folder, torch.bfloat16, torch.device("cpu"), options), tokenizer)
    return folder


async def started(engine: AsyncEngine) -> dict[str, float]:
    """Return what starting has taken."""
    return {
        "parameters": engine.num_parameters,
        "load_seconds": round(engine.load_seconds, 2),
        "load_peak_rss_mib": peak_memory() >> 20,
    }


async def long_answer(engine: AsyncEngine) -> float:
    """Return by how much a long answer's log-probabilities, token by token, differ from those of one pass.

    Raises:
        SettingsError: it does not come whole, or they are not finite.
    """
    prompt = tuple(1 + 7 * place % 4000 for place in range(LONG_PROMPT))
    sampling = SamplingParams(max_tokens=LONG_ANSWER, temperature=0, ignore_eos=True, logprobs=0)
    outputs = [output async for output in engine.generate(GenerationRequest("long", prompt, sampling))]
    drawn = [entry.logprob for output in outputs for entry in output.logprobs]
    answer = tuple(token for output in outputs for token in output.token_ids)
    window = Window(0, len(prompt + answer), len(prompt))
    scored = [scores async for scores in engine.score(ScoreRequest("again", prompt + answer, (window,)))]
    apart = [abs(one - other) for one, other in zip(drawn, scored[0].logprobs, strict=True)]
    if len(answer) != LONG_ANSWER or not all(map(math.isfinite, apart)):
        raise SettingsError(f"an answer of {LONG_ANSWER} tokens ended after {len(answer)}, or is not finite")
    return max(apart)


def options_of(kind: str, *, stored: bool) -> EngineOptions:
    """Return the options of an engine with "bfloat16" or "int8" weights."""
    return EngineOptions(
        device="cpu",
        dtype="bfloat16",
        quantization="int8" if kind == "int8" else None,
        load_format="auto" if stored else "dummy",
    )


def fit_together(folder: Path, weights: list[str], *, stored: bool) -> bool:
    """Return whether the memory holds engines of all kinds at once, and room for their starts."""
    loaders = [
        ModelLoader(folder, torch.bfloat16, torch.device("cpu"), options_of(kind, stored=stored))
        for kind in weights
    ]
    return (
        1.2 * sum(loader.memory(packed=True) + DEFAULT_CPU_CACHE for loader in loaders) < available_memory()
    )


def measure(folder: Path, weights: list[str], *, stored: bool, repeats: int) -> dict[str, Any]:
    """Return the figures of one model by kind of weights, and the ratios of the others to the first kind."""
    figures: dict[str, Any] = {}
    seeds = count()
    with ExitStack() as stack:
        engines: dict[str, EngineProcess] = {}
        for kind in weights:
            engine = stack.enter_context(EngineProcess(folder, options_of(kind, stored=stored)))
            figures[kind] = engine.run(started)
            engines[kind] = engine
        if stored:
            return figures
        for engine in engines.values():
            engine.run(tasks.prefill, WARM_UP_TOKENS, WARM_UP_SEED)
        plan = Plan(repeats=repeats)
        prefill = rounds({kind: partial(_prefill, e, seeds) for kind, e in engines.items()}, plan)
        decode = rounds(
            {kind: partial(e.run, tasks.decode, CONTEXT, 1, TOKENS) for kind, e in engines.items()}, plan
        )
        for kind, engine in engines.items():
            own = figures[kind]
            own[f"prefill_{PROMPT}_tokens_per_s"] = round(statistics.median(prefill[kind, False]), 1)
            own[f"decode_1x{CONTEXT}_tokens_per_s"] = round(statistics.median(decode[kind, False]), 2)
            own[f"answer_of_{LONG_ANSWER}_logprob_difference"] = round(engine.run(long_answer), 4)
            own["peak_rss_mib"] = engine.run(tasks.memory, 0)[0] >> 20
        first, *others = weights
        for kind in others:
            figures[f"{kind}_over_{first}"] = {
                "prefill": round(ratio(prefill[kind, False], prefill[first, False]), 2),
                "decode": round(ratio(decode[kind, False], decode[first, False]), 2),
            }
    return figures


def _prefill(engine: EngineProcess, seeds: Iterator[int]) -> float:
    return engine.run(tasks.prefill, PROMPT, next(seeds))


def main(arguments: argparse.Namespace) -> None:
    """Measure and print, size by size."""
    if arguments.folder is not None:
        write_folder(arguments.sizes[0], arguments.folder, stored=False)
        return
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    results: dict[str, Any] = {"machine": machine(), "sizes": known.get("sizes", {})}
    weights, stored = arguments.weights.split(","), arguments.stored
    for size in arguments.sizes:
        with TemporaryDirectory(dir=arguments.scratch) as scratch:
            folder = write_folder(size, Path(scratch) / size, stored=stored)
            together = fit_together(folder, weights, stored=stored)
            figures: dict[str, Any] = {}
            for kinds in [weights] if together else [[kind] for kind in weights]:
                figures |= measure(folder, kinds, stored=stored, repeats=arguments.repeats)
        name = f"{size}, stored" if stored else size
        results["sizes"][name] = results["sizes"].get(name, {}) | figures
        sys.stdout.write(f"{name} {json.dumps(figures, indent=2)}\n")
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = sorted(path.stem.removeprefix("dape-kerple-") for path in CONFIGS.glob("dape-kerple-*.yaml"))
    parser.add_argument("sizes", nargs="+", choices=sizes, metavar="SIZE")
    parser.add_argument("--weights", default="bfloat16,int8")
    parser.add_argument("--stored", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where folders with weights are written for a while")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.weights.split(",")) - {"bfloat16", "int8"}
    if unknown:
        parser.error(f"--weights: unknown {', '.join(sorted(unknown))}, expected bfloat16 or int8")
    return arguments


if __name__ == "__main__":
    try:
        main(_arguments())
    except DapeError as error:
        sys.exit(error.message)
