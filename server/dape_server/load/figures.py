"""The figures of a load test, each with the formula that is printed beside it.

The words mean different things in different tools: TTFT, ITL, TPOT and goodput are those of vLLM's
benchmark. Only requests that were answered in full count, except where a formula says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dape_server.load.records import Record

FORMULAS: dict[str, str] = {
    "requests": "requests sent and ended, whatever their end",
    "failed": "requests neither answered in full, nor refused (429, 503), nor given up by their client",
    "refused": "answers with status 429 or 503",
    "hung_up": "requests that their client gave up",
    "seconds": "first request sent to last request ended",
    "prompt_tokens_per_s": "sum of usage.prompt_tokens / seconds",
    "output_tokens_per_s": "sum of usage.completion_tokens / seconds",
    "requests_per_s": "requests answered in full / seconds",
    "tokens_per_output": "sum of usage.completion_tokens / streamed outputs",
    "ttft_ms": "TTFT: first streamed output - request sent",
    "itl_ms": "ITL: every gap between two streamed outputs of a request, all requests pooled",
    "tpot_ms": "TPOT: (last output - first output) / (usage.completion_tokens - 1), per request",
    "e2e_ms": "E2E: last byte - request sent",
    "refusal_ms": "last byte of a refusal - request sent",
    "goodput_per_s": "requests that meet every objective / seconds",
}
PERCENTILES = (50, 95, 99)
Distribution = dict[str, float]
"""Count, mean, percentiles and maximum."""


def summarise(records: Sequence[Record], objectives: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return the figures of FORMULAS; one that nothing was measured for is missing.

    Args:
        records: of requests that have ended.
        objectives: greatest `ttft_ms`, `tpot_ms` and `e2e_ms` of a good request, for the goodput.
    """
    figures: dict[str, Any] = {
        "requests": len(records),
        "failed": sum(record.failed for record in records),
        "refused": sum(record.refused for record in records),
        "hung_up": sum(record.hung_up for record in records),
    }
    if not records:
        return figures
    answered = [record for record in records if record.succeeded]
    seconds = max(record.ended for record in records) - min(record.sent for record in records)
    output_tokens = sum(record.output_tokens for record in answered)
    figures |= {
        "seconds": seconds,
        "prompt_tokens_per_s": sum(record.prompt_tokens for record in answered) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "requests_per_s": len(answered) / seconds,
    }
    if outputs := sum(len(record.outputs) for record in answered):
        figures["tokens_per_output"] = output_tokens / outputs
    times: dict[str, list[float]] = {
        "ttft_ms": [value for record in answered if (value := ttft(record)) is not None],
        "itl_ms": [gap for record in answered for gap in gaps(record)],
        "tpot_ms": [value for record in answered if (value := tpot(record)) is not None],
        "e2e_ms": [e2e(record) for record in answered],
        "refusal_ms": [e2e(record) for record in records if record.refused],
    }
    figures |= {name: distribution(values) for name, values in times.items() if values}
    if objectives:
        figures["goodput_per_s"] = sum(_meets(record, objectives) for record in answered) / seconds
    return figures


def ttft(record: Record) -> float | None:
    """Return the milliseconds to the first streamed output; None without one."""
    return 1e3 * (record.outputs[0] - record.sent) if record.outputs else None


def gaps(record: Record) -> list[float]:
    """Return the milliseconds between the streamed outputs."""
    return [1e3 * (later - earlier) for earlier, later in pairwise(record.outputs)]


def tpot(record: Record) -> float | None:
    """Return the milliseconds per token after the first; None for fewer than two tokens."""
    if record.output_tokens < 2 or not record.outputs:
        return None
    return 1e3 * (record.outputs[-1] - record.outputs[0]) / (record.output_tokens - 1)


def e2e(record: Record) -> float:
    """Return the milliseconds of the whole request."""
    return 1e3 * (record.ended - record.sent)


def distribution(values: Sequence[float]) -> Distribution:
    """Return count, mean, percentiles (linear between samples) and maximum; there must be values."""
    percentiles = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"count": len(values), "mean": float(np.mean(values)), **named, "max": float(max(values))}


def _meets(record: Record, objectives: Mapping[str, float]) -> bool:
    values = {"ttft_ms": ttft(record), "tpot_ms": tpot(record), "e2e_ms": e2e(record)}
    return all((value := values[name]) is None or value <= limit for name, limit in objectives.items())
