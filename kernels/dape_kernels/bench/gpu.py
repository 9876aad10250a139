"""One attention layer on a GPU beside what else there is: `python -m dape_kernels.bench.gpu --json FILE`.

Times are medians of CUDA events. With `--dry-run` everything runs at tiny sizes on a CPU, the kernels in
Triton's interpreter: its times mean nothing, but it goes the same way.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dape_kernels.backend import Backend
from dape_kernels.bench.gpu_options import gpu_options
from dape_kernels.bench.workload import BLOCK_SIZE, WORKSPACE, Shape, pairs
from dape_kernels.encoding import Encoding
from dape_kernels.paged import RaggedBatch
from dape_kernels.reference import reference_attention
from dape_kernels.triton import TritonBackend
from dape_kernels.triton.configs import Case, Tiling
from dape_kernels.triton.encoding import GROUP

MIB = 1 << 20
COPY_BYTES = 1 << 30
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured where."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend[Any]
    lengths: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    """Sequences, and keys of each."""
    repeats: int
    shape: Shape


def gpu_plan() -> Plan:
    """Return the plan for this machine's GPU."""
    decode = tuple(
        (batch, keys) for keys in (1024, 16384) for batch in (1, 32, 64, 256) if batch * keys <= 1 << 20
    )
    lengths = (1024, 4096, 16384, 65536)
    return Plan(torch.device("cuda"), torch.bfloat16, TritonBackend(), lengths, decode, 10, Shape())


def dry_plan() -> Plan:
    """Return a plan of seconds for a machine without one."""
    backend = TritonBackend(interpreted=True)
    shape = Shape(heads=3, head_dim=16, width=8)
    return Plan(torch.device("cpu"), torch.float16, backend, (20, 40), ((2, 33),), 1, shape)


def milliseconds(run: Run, device: torch.device, repeats: int) -> float:
    """Return the median time of a call, after one that is not counted."""
    run()
    times: list[float] = []
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e3 * (time.perf_counter() - started) / repeats
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def layer(
    plan: Plan, spans: list[tuple[int, int]], encoding: Encoding, cache_dtype: torch.dtype | None = None
) -> Run:
    """Return a call that computes the last rows of sequences given as (keys, rows), random throughout."""
    shape, backend, device = plan.shape, plan.backend, plan.device
    blocks = [-(-keys // BLOCK_SIZE) for keys, _ in spans]
    size = (shape.heads, shape.head_dim)
    cache = backend.cache.allocate(sum(blocks), BLOCK_SIZE, *size, cache_dtype or plan.dtype, device)
    for first in range(0, sum(blocks) * BLOCK_SIZE, 1 << 16):
        slots = torch.arange(first, min(first + (1 << 16), sum(blocks) * BLOCK_SIZE), device=device)
        key, value = torch.randn(2, len(slots), *size, dtype=plan.dtype, device=device)
        cache.write(key, value, slots)
    tables = torch.zeros(len(spans), max(blocks), dtype=torch.int32)
    first = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.arange(first, first + count)
        first += count
    starts = [0]
    for _, rows in spans:
        starts.append(starts[-1] + rows)
    batch = RaggedBatch(starts, [keys for keys, _ in spans], tables.to(device), BLOCK_SIZE)
    query = torch.randn(starts[-1], *size, dtype=plan.dtype, device=device)
    prepared = backend.prepare(encoding, max(keys for keys, _ in spans), device)
    return lambda: backend.attend(query, cache, batch, prepared, WORKSPACE)


def copy_bandwidth(plan: Plan) -> float:
    """Return GB/s of a large copy on the device, bytes read and written."""
    size = COPY_BYTES if plan.device.type == "cuda" else MIB
    source = torch.empty(size, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source), plan.device, plan.repeats) / 1e6


def prefill(plan: Plan) -> dict[str, Any]:
    """Return milliseconds by length: with DAPE, without, and of what else computes something like it."""
    shape = plan.shape
    rows: dict[str, Any] = {}
    for length in plan.lengths:
        row: dict[str, Any] = {}
        for name, dape in (("dape", True), ("static", False)):
            run = layer(plan, [(length, length)], shape.encoding(dape=dape))
            row[f"{name}_ms"] = milliseconds(run, plan.device, plan.repeats)
            if dape:
                row["extra_mib"] = extra_memory(plan, run, length)
        query, key, value = torch.randn(
            3, 1, shape.heads, length, shape.head_dim, dtype=plan.dtype, device=plan.device
        )
        causal = partial(functional.scaled_dot_product_attention, query, key, value, is_causal=True)
        row["sdpa_ms"] = milliseconds(causal, plan.device, plan.repeats)
        row["xformers_ms"] = xformers(plan, query, key, value)
        row["plain_ms"] = plain(plan, query, key, value)
        row["tflops"] = pairs(length) * shape.flops(dape=True) / row["dape_ms"] / 1e9
        rows[str(length)] = row
    return rows


def xformers(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> float | None:
    """Return milliseconds of causal attention without DAPE by xformers, None where it is not installed."""
    if plan.device.type != "cuda" or find_spec("xformers") is None:
        return None
    from xformers import ops

    rows = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    run = partial(ops.memory_efficient_attention, *rows, attn_bias=ops.LowerTriangularMask())
    return milliseconds(run, plan.device, plan.repeats)


def plain(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> float | None:
    """Return milliseconds of the definition in PyTorch, None where its pairs do not fit the memory."""
    encoding = plan.shape.encoding(dape=True, device=plan.device)
    try:
        with torch.no_grad():
            return milliseconds(
                lambda: reference_attention(query, key, value, encoding), plan.device, min(plan.repeats, 3)
            )
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def extra_memory(plan: Plan, run: Run, length: int) -> float | None:
    """Return MiB that a call takes at its peak beside what was there and its results."""
    if plan.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    results = length * plan.shape.heads * (plan.shape.head_dim * plan.dtype.itemsize + 4)
    return (torch.cuda.max_memory_allocated() - before - results) / MIB


def decode(plan: Plan, bandwidth: float) -> dict[str, Any]:
    """Return milliseconds and share of the copy's bandwidth by sequences x keys and kind of layer."""
    shape, rows = plan.shape, {}
    for batch, keys in plan.decode:
        row = {}
        for name, dape, dtype in (
            ("dape", True, plan.dtype),
            ("static", False, plan.dtype),
            ("dape_int8", True, torch.int8),
        ):
            run = layer(plan, [(keys, 1)] * batch, shape.encoding(dape=dape), dtype)
            taken = milliseconds(run, plan.device, plan.repeats)
            size = batch * plan.backend.cache.block_bytes(keys, shape.heads, shape.head_dim, dtype)
            row[f"{name}_ms"] = taken
            row[f"{name}_share_of_copy"] = size / taken / 1e6 / bandwidth
        rows[f"{batch}x{keys}"] = row
    return rows


def layer_milliseconds(case: Case, tiling: Tiling) -> float:
    """Return the median time of a layer of a case with this tiling on this machine's GPU, for tuning."""
    heads, size = 2 * GROUP if case.grouped else 12, 128 if case.large else 64
    dtype = torch.float32 if case.wide else torch.bfloat16
    shape = Shape(heads, size)
    backend = TritonBackend(tiling=tiling)
    plan = Plan(torch.device("cuda"), dtype, backend, (), (), 5, shape)
    encoding = shape.encoding(dape=case.taps > 0, taps=max(case.taps, 1))
    spans = [(16384, 16384)] if case.phase == "prefill" else [(16384, 1)] * 32
    run = layer(plan, spans, encoding, torch.int8 if case.quantised else dtype)
    return milliseconds(run, plan.device, plan.repeats)


def measure(plan: Plan) -> dict[str, Any]:
    """Return the device, all rows, and the figures of docs/performance.md."""
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(plan)
    prefilled, decoded = prefill(plan), decode(plan, bandwidth)
    device = torch.cuda.get_device_name() if plan.device.type == "cuda" else "CPU, Triton's interpreter"
    with_plain = [row for row in prefilled.values() if row["plain_ms"] is not None]
    return {
        "device": device,
        "torch": torch.__version__,
        "kernels": plan.backend.describe(),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "shape": asdict(plan.shape),
        "copy_gb_s": bandwidth,
        "figures": {
            "prefill_ms": {n: row["dape_ms"] for n, row in prefilled.items()},
            "prefill_time_over_sdpa": {n: row["dape_ms"] / row["sdpa_ms"] for n, row in prefilled.items()},
            "prefill_speedup_over_plain": with_plain[-1]["plain_ms"] / with_plain[-1]["dape_ms"],
            "prefill_extra_mib": {n: row["extra_mib"] for n, row in prefilled.items()},
            "decode_share_of_copy": {n: row["dape_share_of_copy"] for n, row in decoded.items()},
        },
        "prefill": prefilled,
        "decode": decoded,
    }


def main(arguments: list[str]) -> None:
    """Measure and write the JSON; a summary goes to the terminal."""
    options = gpu_options(__doc__, arguments)
    results = measure(dry_plan() if options.dry_run else gpu_plan())
    options.json.write_text(json.dumps(results, indent=1))
    sys.stdout.write(json.dumps({"device": results["device"], **results["figures"]}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
