"""What a decode step costs beside its graph: `python -m dape_engine.bench.graph_steps --json FILE`.

With `--dry-run` it goes the same way on a CPU, a graph being work that is done again: its times mean nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dape_engine.bench.models import write_random_model
from dape_engine.loading import load_model
from dape_engine.options import EngineOptions
from dape_engine.request import SamplingParams
from dape_engine.runner import ModelRunner
from dape_engine.sampling import SamplerState
from dape_engine.sequence import Sequence
from dape_engine.step import Chunk
from dape_kernels.attention import BACKENDS
from dape_kernels.bench.gpu_options import gpu_options
from dape_kernels.triton import TritonBackend

PREFILL_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured where."""

    device: torch.device
    dtype: torch.dtype
    model: str
    streams: int
    context: int
    repeats: int


GPU = Plan(torch.device("cuda"), torch.bfloat16, "125m", 64, 1024, 50)
DRY = Plan(torch.device("cpu"), torch.float32, "small", 2, 6, 1)


def measure(plan: Plan) -> dict[str, Any]:
    """Return milliseconds of a decode step of all streams, of its graph, and of the host beside it."""
    sampling = SamplingParams(max_tokens=16, temperature=0)
    options = EngineOptions(
        attention_backend="triton", max_num_seqs=plan.streams, kv_cache_memory=_cache(plan)
    )
    with TemporaryDirectory() as scratch:
        model = load_model(write_random_model(plan.model, Path(scratch)), plan.dtype, plan.device)
    runner = ModelRunner(model, options, 2 * plan.context)
    each = -(-(plan.context + 1) // options.block_size)
    chunks, states = [], {}
    generator = torch.Generator().manual_seed(0)
    for stream in range(plan.streams):
        tokens = torch.randint(1, model.config.vocab_size, (plan.context,), generator=generator).tolist()
        sequence = Sequence(f"{stream}", tokens, sampling)
        sequence.blocks = list(range(stream * each, (stream + 1) * each))
        states[sequence] = SamplerState(sampling, tokens, None, model.config.vocab_size)
        for first in range(0, plan.context, PREFILL_ROWS):
            runner.run([Chunk(sequence, first, min(PREFILL_ROWS, plan.context - first))], states)
        chunks.append(Chunk(sequence, plan.context - 1, 1))
    graphs = runner.graphs
    if graphs is None:
        raise RuntimeError("the engine has captured no graphs")
    step = _milliseconds(lambda: runner.run(chunks, states), plan)
    replay = _milliseconds(lambda: graphs.replay(plan.streams), plan)
    return {
        "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else "CPU, Triton's interpreter",
        "model": plan.model,
        "streams": plan.streams,
        "context": plan.context,
        "step_ms": step,
        "graph_ms": replay,
        "host_ms_outside_graph": step - replay,
    }


def _cache(plan: Plan) -> int:
    return 16 << 30 if plan.device.type == "cuda" else 8 << 20


def _milliseconds(run: Callable[[], object], plan: Plan) -> float:
    """Return the median time on the wall until the device is done."""
    times = []
    for _ in range(plan.repeats + 1):
        started = time.perf_counter()
        run()
        if plan.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def main(arguments: list[str]) -> None:
    """Measure, and write the JSON."""
    options = gpu_options(__doc__, arguments)
    if options.dry_run:
        BACKENDS["triton"] = TritonBackend(interpreted=True)
    figures = measure(DRY if options.dry_run else GPU)
    options.json.write_text(json.dumps(figures, indent=1))
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
