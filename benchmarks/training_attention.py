"""Time and memory of training attention, forward and backward, one layer, beside the plain form.

    python benchmarks/training_attention.py [--against FILE.py] [--precision bf16|fp32] [--json OUT]

"in PyTorch" is without the network in C++. `--against` names a file with another `dense_attention`, for
instance an older one from version control. All variants of a case take turns; medians are reported. Memory is
what one forward pass keeps for the backward pass beside q, k, v and the parameters, counted at torch's hooks
of saved tensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dape_engine.config import DapeConfig, PositionConfig
from dape_engine.encoding import PositionalEncoding
from dape_kernels.dense import adapt, attention, dense_attention
from dape_kernels.reference import reference_attention

HEADS, HEAD_DIM = 8, 32
TOKENS = 4096
"""Per step, so many sequences of the length at hand as make these."""
# The plain form keeps dozens of numbers for every pair and head.
PLAIN_UP_TO = 512
KERPLE, FIRE = PositionConfig(kind="kerple"), PositionConfig(kind="fire")
LAYERS = {
    "kerple": (KERPLE, None),
    "kerple-v1": (KERPLE, DapeConfig(width=32)),
    "kerple-v2-k3": (KERPLE, DapeConfig(version=2, kernel=3, width=32)),
    "fire": (FIRE, None),
    "fire-v1": (FIRE, DapeConfig(width=32)),
    "cope": (PositionConfig(kind="cope"), None),
}
Attention = Callable[..., Tensor]
LIMIT = attention.KEPT_BYTES
AVAILABLE = adapt.available


def variants(against: Path | None, length: int) -> dict[str, Attention]:
    """Return what is compared at a length, by name."""

    def own(limit: int, *, compiled: bool = True) -> Attention:
        def run(*arguments: object) -> Tensor:
            # Until the next variant runs, as the backward pass asks too.
            attention.KEPT_BYTES = limit
            adapt.available = AVAILABLE if compiled else lambda *_: False
            return dense_attention(*arguments)  # type: ignore[arg-type]

        return run

    found: dict[str, Attention] = {
        "dense": own(LIMIT),
        "recomputing": own(0),
        "in PyTorch": own(LIMIT, compiled=False),
    }
    if against is not None:
        spec = importlib.util.spec_from_file_location("other_dense", against)
        if spec is None or spec.loader is None:
            raise SystemExit(f"--against {against}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[against.stem] = module.dense_attention
    if length <= PLAIN_UP_TO:
        found["plain"] = reference_attention
    return found


def step(run: Attention, module: PositionalEncoding, inputs: list[Tensor]) -> tuple[float, int]:
    """Return the seconds of a forward and backward pass and the bytes kept between them."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *module.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run(*inputs, module.encoding())
    output.backward(output.detach())
    return time.perf_counter() - started, sum(kept.values())


def measure(
    layer: str, length: int, dtype: torch.dtype, against: Path | None, seconds: float
) -> dict[str, dict[str, float]]:
    """Return median milliseconds and kept MiB of every variant."""
    torch.manual_seed(0)
    module = PositionalEncoding(*LAYERS[layer], HEADS, HEAD_DIM)
    shape = max(1, TOKENS // length), HEADS, length, HEAD_DIM
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    found = variants(against, length)
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in found}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(samples["dense"]) < 4:
        for name, run in found.items():
            samples[name].append(step(run, module, inputs))
    return {
        name: {
            # The first call warms up.
            "milliseconds": 1000 * statistics.median(taken for taken, _ in runs[1:]),
            "kept_mib": runs[0][1] / 2**20,
        }
        for name, runs in samples.items()
    }


def main() -> None:
    """Print a line per variant and write all to JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--seconds", type=float, default=10, help="for each case")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--layers", choices=LAYERS, nargs="+", default=["kerple", "kerple-v1"])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    rows = []
    for length in arguments.lengths:
        for name in arguments.layers:
            found = measure(name, length, dtype, arguments.against, arguments.seconds)
            for variant, numbers in found.items():
                ratio = numbers["milliseconds"] / found["dense"]["milliseconds"]
                rows.append({"length": length, "layer": name, "variant": variant, **numbers, "ratio": ratio})
                print(  # noqa: T201
                    f"{length:6} {name:14} {variant:14} {numbers['milliseconds']:9.1f} ms {ratio:6.2f} "
                    f"{numbers['kept_mib']:8.1f} MiB"
                )
    if arguments.json is not None:
        settings = {
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "tokens": TOKENS,
            "precision": arguments.precision,
            "threads": arguments.threads,
        }
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
