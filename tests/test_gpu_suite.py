"""The GPU suite goes its whole way on a machine without a GPU, and its tilings compile for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
pytest.importorskip("triton")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this Python, and without the interpreter of Triton that the tests use."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**inherited, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_dry_run_writes_all_figures(tmp_path: Path) -> None:
    result = run("benchmarks/gpu_suite.sh", "--dry-run", str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert len(result.stdout.splitlines()) < 100
    assert "1 passed" in (tmp_path / "checks.log").read_text()
    kernels = read(tmp_path / "kernels.json")
    assert kernels["device"] == "CPU, Triton's interpreter"
    assert kernels["figures"].keys() == {
        "prefill_ms",
        "prefill_time_over_sdpa",
        "prefill_speedup_over_plain",
        "prefill_extra_mib",
        "decode_share_of_copy",
    }
    assert all(row["dape_ms"] > 0 and row["plain_ms"] > 0 for row in kernels["prefill"].values())
    training = read(tmp_path / "training.json")
    assert training["figures"].keys() == {
        "training_ms",
        "training_speedup_over_blockwise",
        "training_speedup_over_plain",
        "training_peak_mib",
    }
    ways = ("triton", "triton_forward", "blockwise", "plain", "triton_static", "sdpa")
    assert all(row[f"{way}_ms"] > 0 for row in training["training"].values() for way in ways)
    step = read(tmp_path / "graph_steps.json")
    assert step["step_ms"] > 0
    assert step["host_ms_outside_graph"] == step["step_ms"] - step["graph_ms"]
    assert read(tmp_path / "engine.json")["models"]["small"]["decode"]["2 x 20"] > 0


def test_a_failed_part_fails_the_suite_and_no_other(tmp_path: Path) -> None:
    result = run("benchmarks/gpu_suite.sh", "--dry-run", str(tmp_path), PYTHON="/bin/false")
    assert result.returncode == 1
    for part in ("checks", "kernels", "training", "graph_steps", "engine"):
        assert f"== {part} FAILED (1)" in result.stdout
    assert run("benchmarks/gpu_suite.sh", "--wet-run").returncode == 2


def test_committed_tilings_compile_for_a_gpu(tmp_path: Path) -> None:
    """Within the registers and shared memory of compute capability 9.0; only backward passes may spill."""
    found = tmp_path / "compiled.json"
    script = (
        "import json, sys\n"
        "from dataclasses import asdict\n"
        "from dape_kernels.triton.configs import TRAINING, Case, choose\n"
        "from dape_kernels.triton.resources import compiled\n"
        "cases = [Case('prefill'), Case('decode'), *map(Case, TRAINING)]\n"
        "json.dump([asdict(compiled(c, choose((9, 0), c))) for c in cases], open(sys.argv[1], 'w'))\n"
    )
    result = run(sys.executable, "-c", script, str(found))
    assert result.returncode == 0, result.stderr
    for resources, most_spilled in zip(read(found), (0, 0, 0, 256, 512), strict=True):
        assert resources["spilled_bytes"] <= most_spilled
        assert resources["shared_bytes"] <= 232_448
        assert resources["registers"] <= 255
        assert 0 < resources["instructions"] < 2000


@pytest.mark.slow
def test_tuning_without_a_gpu_ranks_by_instructions(tmp_path: Path) -> None:
    result = run(
        sys.executable, "-m", "dape_kernels.triton.tune", "--cases", "1", "--json", str(tmp_path / "t.json")
    )
    assert result.returncode == 0, result.stderr
    (case,) = read(tmp_path / "t.json")
    order = [(row["spilled_bytes"] > 0, row["cost"]) for row in case["tried"]]
    assert order == sorted(order)
    assert case["committed"] == case["tried"][0]["tiling"]
