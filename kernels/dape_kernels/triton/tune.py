"""Look for the best tilings, offline: `python -m dape_kernels.triton.tune [--json FILE]`.

On a CUDA device the candidates are timed, on 16,384 tokens (prefill) and on 32 sequences of 16,384
keys (decode), training on 2 of 4096 tokens; elsewhere they are compiled for `--capability` and ranked by
instructions per pair. What is best goes into `configs.py` by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dape_kernels.triton.configs import TRAINING, Case, Tiling, choose, roomy
from dape_kernels.triton.resources import Resources, compiled

CASES = (
    Case("prefill"),
    Case("decode"),
    Case("prefill", taps=0),
    Case("prefill", taps=3),
    Case("prefill", large=True),
    Case("prefill", grouped=True),
    Case("decode", quantised=True),
    Case("decode", taps=3),
    *(Case(phase, taps=taps) for phase in TRAINING for taps in (1, 0)),
)
SHARED_BYTES = {(9, 0): 232_448, (10, 0): 232_448}
SMALL_SHARED_BYTES = 101_376


def candidates(case: Case) -> list[Tiling]:
    """Return the tilings worth a try: those whose accumulators fit the registers."""
    rows = (1,) if case.phase == "decode" else (16, 32)
    keys = (16, 32, 64) if case.phase == "decode" else (16, 32)
    halo = 4 * (case.taps // 2)
    return [
        Tiling(m, n, warps, stages)
        for m, n, warps, stages in product(rows, keys, (4, 8, 16), (1, 2, 3))
        if m * n <= 512 and n > halo and (case.phase != "backward_rows" or m == n)
    ]


def inspect(case: Case, tiling: Tiling, capability: tuple[int, int]) -> dict[str, Any]:
    """Return what the compiler says of a candidate; it must fit the device's shared memory."""
    resources: Resources = compiled(case, tiling, capability)
    fits = resources.shared_bytes <= SHARED_BYTES.get(capability, SMALL_SHARED_BYTES)
    cost = resources.cost(tiling, case.taps) if fits else float("inf")
    return {"tiling": asdict(tiling), "cost": cost, **asdict(resources)}


def time(case: Case, tiling: Tiling) -> dict[str, Any]:
    """Return the median milliseconds of a candidate on this GPU; infinite where it does not run."""
    from dape_kernels.bench import gpu, gpu_training

    measured = gpu_training if case.phase in TRAINING else gpu
    try:
        cost = measured.layer_milliseconds(case, tiling)
    except Exception as error:  # a candidate that does not compile or fit is no reason to stop
        return {
            "tiling": asdict(tiling),
            "cost": float("inf"),
            "error": f"{type(error).__name__}: {error}"[:200],
        }
    return {"tiling": asdict(tiling), "cost": cost}


def main(arguments: list[str]) -> None:
    """Print every case with its candidates, best first, and the line that is committed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all that was found")
    parser.add_argument(
        "--capability", default="9.0", help="compute capability to compile for, without a GPU"
    )
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first cases of the list")
    options = parser.parse_args(arguments)
    major, minor = map(int, options.capability.split("."))
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (major, minor)
    found = []
    for case in CASES[: options.cases]:
        if case.phase in TRAINING and not roomy(capability):
            continue
        tried = [
            time(case, tiling) if torch.cuda.is_available() else inspect(case, tiling, capability)
            for tiling in candidates(case)
        ]
        # What the compiler counts leaves out what spilled registers cost.
        tried.sort(key=lambda row: (row.get("spilled_bytes", 0) > 0, row["cost"]))
        found.append({"case": asdict(case), "committed": asdict(choose(capability, case)), "tried": tried})
        sys.stdout.write(f"{case}\n  committed {choose(capability, case)}\n")
        for row in tried[:3]:
            sys.stdout.write(f"  {row}\n")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main(sys.argv[1:])
