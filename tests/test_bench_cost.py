"""The cost of DAPE: scaling to all layers, what is measured of each length, and going on with a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dape_engine.bench.cost import SIZES, Size
from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_server.cli.bench_cost import cost


class TimedEngine:
    """Stands for an engine in a process: 500 tokens per second, 400 with DAPE, 100 in plain PyTorch."""

    def __init__(self, folder: Path, options: EngineOptions):
        self.speed = 500.0 if folder.name.endswith("static") else 400.0
        if options.attention_backend == "reference":
            self.speed = 100.0

    def __enter__(self) -> TimedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, _: Callable[..., Any], *__: int) -> float:
        return self.speed


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "350m", Size(32, 6, 4))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cost.json"


def run_command(*arguments: str) -> None:
    CliRunner().invoke(cost, arguments, catch_exceptions=False, standalone_mode=False)


def test_contestants_take_turns_in_engines_of_their_own(path: Path) -> None:
    run_command("350m", "--json", str(path), "--lengths", "64", "--repeats", "1")
    results = json.loads(path.read_text())
    figures = results["sizes"]["350m"]["costs"]["64"]
    assert set(figures) == {"static", "dape", "plain", "dape_over_static", "plain_over_dape"}
    # One round: the ratio is that of the two times.
    assert figures["dape_over_static"] == pytest.approx(figures["dape"] / figures["static"])
    assert figures["plain_over_dape"] == pytest.approx(figures["plain"] / figures["dape"])
    assert (results["sizes"]["350m"]["layers"], results["measured_layers"]) == (6, 1)


def test_times_are_scaled_and_the_file_is_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dape_engine.bench.cost.EngineProcess", TimedEngine)
    arguments = ("350m", "--json", str(path), "--plain-up-to", "64", "--layers", "2")
    run_command(*arguments, "--lengths", "64,128")
    costs = json.loads(path.read_text())["sizes"]["350m"]["costs"]
    # 2 ms a token for two layers of six.
    expected = {"static": 6, "dape": 7.5, "dape_over_static": 1.25}
    assert costs["128"] == pytest.approx(expected)
    assert costs["64"] == pytest.approx({**expected, "plain": 30, "plain_over_dape": 4})
    monkeypatch.setattr(TimedEngine, "run", lambda *_: 1000.0)
    run_command(*arguments, "--lengths", "128,256")
    later = json.loads(path.read_text())["sizes"]["350m"]["costs"]
    assert later["128"] == costs["128"]
    assert later["256"]["static"] == 3
    with pytest.raises(SettingsError, match="was made under another measured_layers"):
        run_command("350m", "--json", str(path))


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(SettingsError, match="unknown size 13b, expected one of 350m"):
        run_command("13b")
