"""One layer of training on a GPU beside other ways: `python -m dape_kernels.bench.gpu_training --json FILE`.

Forward and backward of DAPE-Kerple: the Triton kernels, PyTorch in blocks, the definition under plain
autograd, and PyTorch's own attention without DAPE. Times are medians of CUDA events, memory is the peak; a
`--dry-run` goes the same way at tiny sizes on a CPU, in Triton's interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dape_kernels.bench.gpu import MIB, milliseconds
from dape_kernels.bench.workload import Shape
from dape_kernels.dense import blockwise_attention
from dape_kernels.encoding import Encoding
from dape_kernels.reference import reference_attention
from dape_kernels.triton.configs import Case, Phase, Tiling
from dape_kernels.triton.dense.attention import fused_attention
from dape_kernels.triton.encoding import GROUP

Attention = Callable[[Tensor, Tensor, Tensor, Encoding], Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured where."""

    device: torch.device
    dtype: torch.dtype
    batches: tuple[tuple[int, int], ...]
    """Sequences, and tokens of each."""
    repeats: int
    shape: Shape


def gpu_plan() -> Plan:
    """Return the plan for this machine's GPU: the train lengths of the paper, and longer ones."""
    batches = ((64, 128), (16, 512), (4, 2048), (2, 4096))
    return Plan(torch.device("cuda"), torch.bfloat16, batches, 7, Shape())


def dry_plan() -> Plan:
    """Return a plan of seconds for a machine without one."""
    return Plan(torch.device("cpu"), torch.float16, ((2, 18),), 1, Shape(heads=3, head_dim=16, width=8))


class Layer:
    """A layer whose parameters learn, with inputs and a gradient in its output, all random.

    Args:
        plan: where it lies.
        sequences: of the batch.
        tokens: of each sequence.
        dape: Kerple with DAPE or without.
    """

    def __init__(self, plan: Plan, sequences: int, tokens: int, *, dape: bool):
        encoding = plan.shape.encoding(dape=dape, device=plan.device)
        self._parameters = [tensor.detach().requires_grad_() for tensor in encoding.tensors]
        self._encoding = encoding.with_tensors(self._parameters)
        size = (sequences, plan.shape.heads, tokens, plan.shape.head_dim)
        drawn = torch.randn(4, *size, dtype=plan.dtype, device=plan.device)
        self._inputs = [tensor.detach().requires_grad_() for tensor in drawn[:3]]
        self._gradient = drawn[3]

    def forward(self, attend: Attention) -> Tensor:
        """Return the output, without gradients."""
        with torch.no_grad():
            return attend(self._inputs[0], self._inputs[1], self._inputs[2], self._encoding)

    def step(self, attend: Attention) -> None:
        """Compute the output and the gradients in inputs and parameters."""
        output = attend(self._inputs[0], self._inputs[1], self._inputs[2], self._encoding)
        learning = [*self._inputs, *self._parameters]
        torch.autograd.grad(output, learning, self._gradient, allow_unused=True)


def without_bias(query: Tensor, key: Tensor, value: Tensor, encoding: Encoding) -> Tensor:  # noqa: ARG001
    """PyTorch's own attention, causal."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def peak_mib(plan: Plan, run: Callable[[], None]) -> float | None:
    """Return MiB that a call takes at its peak beside what was there."""
    if plan.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measure_batch(plan: Plan, sequences: int, tokens: int) -> dict[str, Any]:
    """Return milliseconds and MiB of each way, None where its pairs do not fit the memory."""
    layers = {dape: Layer(plan, sequences, tokens, dape=dape) for dape in (True, False)}
    ways: dict[str, tuple[bool, Attention]] = {
        "triton": (True, fused_attention),
        "blockwise": (True, blockwise_attention),
        "plain": (True, reference_attention),
        "triton_static": (False, fused_attention),
        "sdpa": (False, without_bias),
    }
    row: dict[str, Any] = {}
    for name, (dape, attend) in ways.items():
        layer = layers[dape]
        run = partial(layer.step, attend)
        try:
            row[f"{name}_ms"] = milliseconds(run, plan.device, plan.repeats)
            row[f"{name}_mib"] = peak_mib(plan, run)
        except torch.OutOfMemoryError:
            row[f"{name}_ms"] = row[f"{name}_mib"] = None
            torch.cuda.empty_cache()
    row["triton_forward_ms"] = milliseconds(
        partial(layers[True].forward, fused_attention), plan.device, plan.repeats
    )
    return row


def layer_milliseconds(case: Case, tiling: Tiling) -> float:
    """Return the median time of a layer of training with this tiling in one phase, for tuning."""
    tilings: Mapping[Phase, Tiling] = {case.phase: tiling}
    shape = Shape(2 * GROUP if case.grouped else 12, 128 if case.large else 64)
    plan = Plan(torch.device("cuda"), torch.bfloat16, (), 5, shape)
    layer = Layer(plan, 2, 4096, dape=case.taps > 0)
    attend = partial(fused_attention, tilings=tilings)
    run = partial(layer.forward if case.phase == "forward" else layer.step, attend)
    return milliseconds(run, plan.device, plan.repeats)


def measure(plan: Plan) -> dict[str, Any]:
    """Return the device, all rows, and the figures of docs/performance.md."""
    torch.manual_seed(0)
    rows = {f"{batch}x{tokens}": measure_batch(plan, batch, tokens) for batch, tokens in plan.batches}

    def over(other: str) -> dict[str, float | None]:
        found = ((name, row[f"{other}_ms"], row["triton_ms"]) for name, row in rows.items())
        return {name: None if theirs is None else theirs / ours for name, theirs, ours in found}

    return {
        "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else "CPU, Triton's interpreter",
        "torch": torch.__version__,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "shape": asdict(plan.shape),
        "figures": {
            "training_ms": {name: row["triton_ms"] for name, row in rows.items()},
            "training_speedup_over_blockwise": over("blockwise"),
            "training_speedup_over_plain": over("plain"),
            "training_peak_mib": {name: row["triton_mib"] for name, row in rows.items()},
        },
        "training": rows,
    }


def main(arguments: list[str]) -> None:
    """Measure and write the JSON; a summary goes to the terminal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is imported with the first launch
    elif not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --dry-run goes the same way without one")
    results = measure(dry_plan() if options.dry_run else gpu_plan())
    options.json.write_text(json.dumps(results, indent=1))
    sys.stdout.write(json.dumps({"device": results["device"], **results["figures"]}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
