"""What a tiling takes of a GPU, read off the compiled kernel: works on machines without one.

Needs Triton without its interpreter (no TRITON_INTERPRET in the environment).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dape_kernels.triton.attend import attend_kernel
from dape_kernels.triton.configs import TRAINING, Case, Tiling
from dape_kernels.triton.dense.attention import training_shape
from dape_kernels.triton.dense.backward import Sums, keys_kernel, rows_kernel
from dape_kernels.triton.dense.forward import forward_kernel
from dape_kernels.triton.dense.gradients import Sources
from dape_kernels.triton.dense.tiles import Heads, Network
from dape_kernels.triton.encoding import GROUP, TABLE, padded

WARP = 32
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# A layer of each kind that `Case` tells apart.
HEADS, GROUPED_HEADS = 12, 32
SIZE, LARGE_SIZE = 64, 128
WIDTH = 32
KERNELS = {"forward": forward_kernel, "backward_keys": keys_kernel, "backward_rows": rows_kernel}
# Tensors in the dtype of products, by their names in the kernel of serving.
PRODUCTS = ("query", "keys", "values", "output", "first", "second")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one program: registers of a thread, bytes, and machine instructions of a thread in one tile."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int

    def cost(self, tiling: Tiling, taps: int) -> float:
        """Return warp instructions per (query, key) pair: the fewer, the faster, all else being equal."""
        halo = 2 * (taps // 2)
        return self.instructions * tiling.warps / (tiling.rows * (tiling.keys - 2 * halo))


def settings(case: Case, tiling: Tiling) -> dict[str, Any]:
    """Return the compile-time parameters of the kernel for a typical layer of a case."""
    heads = GROUPED_HEADS if case.grouped else HEADS
    size = LARGE_SIZE if case.large else SIZE
    width = WIDTH if case.taps else 0
    if case.phase in TRAINING:
        shape = training_shape(heads, size, width, tiling, keeps_scores=True, wide=case.wide)
        return {"SHAPE": shape} | ({"LEARNS": True} if case.phase == "backward_rows" else {})
    return {
        "HEADS": heads,
        "SIZE": size,
        "DIM": padded(size),
        "GROUPS": -(-heads // GROUP),
        "WIDTH": width,
        "TAPS": max(case.taps, 1),
        "KEEPS_SCORES": True,
        "KEEPS_BIAS": True,
        "FEEDS_BIAS": case.taps > 0,
        "OFFICIAL": False,
        "KIND": TABLE,
        "UNITS": padded(1),
        "QUANTISED": case.quantised,
        "BLOCK_SIZE": 16,
        "PARTED": case.phase == "decode",
        "PRECISION": "ieee" if case.wide else "tf32",
        "ROWS": tiling.rows,
        "KEYS": tiling.keys,
    }


def compiled(case: Case, tiling: Tiling, capability: tuple[int, int] = (9, 0)) -> Resources:
    """Compile the kernel for a GPU of this compute capability and return what it takes."""
    kernel = KERNELS.get(case.phase, attend_kernel)
    constants = settings(case, tiling)
    names = kernel.arg_names
    types = _types(case)
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "i32" if name.endswith("_stride") else "*fp32")
        for name in names
    }
    aligned = {
        path: [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in ("table_stride", "splits", "sequences", "tokens")
        for path, kind in _leaves((place,), signature[name])
        if kind.startswith("*") or kind == "i32"
    }
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], WARP)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    found = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(found.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    taken = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if taken is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    shared = int(found.metadata.shared)
    return Resources(int(taken[1]), int(taken[2]), shared, _longest_loop(listing))


def _types(case: Case) -> dict[str, Any]:
    """Return the types of the arguments that are neither strides nor float32 tensors, by their names."""
    product = "*fp32" if case.wide else "*bf16"
    types: dict[str, Any] = {"scale": "fp32"} | dict.fromkeys(("splits", "sequences", "tokens"), "i32")
    if case.phase not in TRAINING:
        cached = dict.fromkeys(("keys", "values"), "*i8") if case.quantised else {}
        return types | dict.fromkeys(PRODUCTS, product) | {"items": "*i32", "block_tables": "*i32"} | cached
    heads = Heads(product, "i32", "i32", "i32")
    network = Network(product, product, product, "*fp32")
    types |= dict.fromkeys(("output", "grad_query", "grad_key", "grad_value"), product)
    types |= dict.fromkeys(("query", "key", "value"), heads)
    types["network"] = network
    types["sources"] = Sources(heads, heads, heads, product, "*fp32", "*fp32", network)
    types["sums"] = Sums(*["*fp32"] * 4)
    return types


def _leaves(path: tuple[int, ...], kind: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield the types in a nested one, with where they stand."""
    if isinstance(kind, str):
        yield path, kind
    else:
        for place, part in enumerate(kind):
            yield from _leaves((*path, place), part)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _longest_loop(listing: str) -> int:
    """Return the instructions of the longest loop without another inside, which jumps back to its start."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+\S.*;", line):
            count += 1
            if (branch := re.search(r"\bBRA\b.*(\.L_\w+)", line)) and branch[1] in labels:
                loops.append((labels[branch[1]], count))
    innermost = [
        end - start for start, end in loops if not any(start <= other and stop < end for other, stop in loops)
    ]
    return max(innermost, default=0)
