"""A whole run: every measurement, and the figures by which the kernels are judged."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import torch

from dape_kernels.bench.accuracy import max_relative_error
from dape_kernels.bench.cases import Case, Setup, kernel_obstacle
from dape_kernels.bench.decode import CACHE_DTYPES, cache_bytes, measure_decode
from dape_kernels.bench.machine import machine
from dape_kernels.bench.memory import prefill_extra_bytes
from dape_kernels.bench.prefill import measure_prefill, plain_fits
from dape_kernels.bench.timing import Progress, Seconds, ratio
from dape_kernels.bench.workload import pairs

Samples = Mapping[Case, Sequence[Seconds]]
Figure = float | dict[str, float]

PLAIN = Case("plain", torch.float32, True)
SDPA = Case("sdpa", torch.float32, False)
FP32, FP32_OFF = Case("cpu", torch.float32, True), Case("cpu", torch.float32, False)
BF16 = Case("cpu", torch.bfloat16, True)
FMA = Case("fma", torch.float32)


@dataclass(slots=True)
class Report:
    """What a run found."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
    """By name: a number, or numbers by length or by dtype."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The medians of every case, in the order of measurement."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why something was not measured."""


def run(setup: Setup, progress: Progress) -> Report:
    """Measure everything that this machine can run.

    Raises:
        ValueError: DAPE_CPU_ISA is wrong.
    """
    shape = setup.shape
    report = Report(
        machine(),
        {**asdict(shape), "repeats": setup.repeats, "working_set_mib": setup.working_set >> 20},
    )
    obstacle = kernel_obstacle(setup, torch.float32)
    if obstacle is not None:
        report.left_out["cpu"] = f"{obstacle}; the figures are ratios of its times"
    prefills: dict[int, Samples] = {}
    for length in setup.lengths:
        if not plain_fits(setup, length):
            report.left_out[f"plain at {length}"] = "takes too long, or too much memory: it stores every pair"
        show = partial(progress, f"prefill of {length}", total=setup.repeats)
        prefills[length] = measure_prefill(setup, length, show)
        report.rows += [_prefill_row(setup, length, case, prefills[length]) for case in prefills[length]]
    show = partial(progress, f"decode at {setup.keys}", total=setup.repeats)
    decode = measure_decode(setup, show)
    report.rows += [_decode_row(setup, case, decode) for case in decode]
    if obstacle is None:
        report.figures = {
            **prefill_figures(prefills),
            **decode_figures(setup.keys, decode),
            "fp32_max_relative_error": max_relative_error(shape),
        }
        longest = max(setup.lengths)
        extra = prefill_extra_bytes(shape, longest)
        report.figures[f"prefill_{longest}_extra_mib"] = extra / 2**20
    return report


def prefill_figures(prefills: Mapping[int, Samples]) -> dict[str, Figure]:
    """Return the figures of prefill by length: ratios of processor time."""
    wanted = {
        "prefill_fp32_share_of_fma_peak": (FMA, FP32),
        "prefill_fp32_time_over_sdpa": (FP32, SDPA),
        "prefill_fp32_speedup_over_plain": (PLAIN, FP32),
        "prefill_fp32_dape_on_over_off": (FP32, FP32_OFF),
        "prefill_bf16_speedup_over_fp32": (FP32, BF16),
    }
    return {
        name: {
            str(length): _ratio(samples, over, under, "cpu")
            for length, samples in prefills.items()
            if over in samples and under in samples
        }
        for name, (over, under) in wanted.items()
    }


def decode_figures(keys: int, samples: Samples) -> dict[str, Figure]:
    """Return the figures of decode steps, by the dtype of the cache: ratios of wall time."""
    by_dtype = [dtype for dtype in CACHE_DTYPES if Case("cpu", dtype, True) in samples]
    figures: dict[str, Figure] = {
        f"decode_{keys}_share_of_read_probe": {
            _name(dtype): _ratio(samples, Case("read", dtype), Case("cpu", dtype, True), "wall")
            for dtype in by_dtype
        },
        f"decode_{keys}_dape_on_over_off": {
            _name(dtype): _ratio(samples, Case("cpu", dtype, True), Case("cpu", dtype, False), "wall")
            for dtype in by_dtype
        },
    }
    int8 = Case("cpu", torch.int8, True)
    if int8 in samples and BF16 in samples:
        figures[f"decode_{keys}_int8_speedup_over_bf16"] = _ratio(samples, BF16, int8, "wall")
    return figures


def _prefill_row(setup: Setup, length: int, case: Case, samples: Samples) -> dict[str, Any]:
    # The probe runs as many operations as the kernel with DAPE has.
    work = setup.shape.flops(dape=case.dape is not False) * pairs(length)
    row = _row("prefill", case, length, samples[case])
    cpu = row["cpu_ms"] / 1e3
    row |= {"cpu_ns_per_pair": cpu * 1e9 / pairs(length), "gflops_per_core": work / cpu / 1e9}
    peak = Case("fma", case.dtype)
    if peak in samples and case.dape is not None:
        with_dape = setup.shape.flops(dape=True) * pairs(length)
        share = _ratio(samples, peak, case, "cpu")
        row["share_of_peak"] = share * work / with_dape
    return row


def _decode_row(setup: Setup, case: Case, samples: Samples) -> dict[str, Any]:
    row = _row("decode", case, setup.keys, samples[case])
    row["gb_per_s"] = cache_bytes(setup, case.dtype) / row["wall_ms"] / 1e6
    read = Case("read", case.dtype)
    if read in samples and case.dape is not None:
        row["share_of_read"] = _ratio(samples, read, case, "wall")
    return row


def _row(phase: str, case: Case, tokens: int, samples: Sequence[Seconds]) -> dict[str, Any]:
    wall = [taken.wall * 1e3 for taken in samples]
    return {
        "phase": phase,
        "kernel": case.kernel,
        "dtype": _name(case.dtype),
        "dape": case.dape,
        "tokens": tokens,
        "cpu_ms": statistics.median(taken.cpu for taken in samples) * 1e3,
        "wall_ms": statistics.median(wall),
        "wall_ms_range": [min(wall), max(wall)],
    }


def _ratio(samples: Samples, over: Case, under: Case, clock: Literal["cpu", "wall"]) -> float:
    taken = attrgetter(clock)
    return ratio([taken(s) for s in samples[over]], [taken(s) for s in samples[under]])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
