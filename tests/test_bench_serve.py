"""`dape bench serve`: figures of both servers come out, from requests that were counted."""

from __future__ import annotations

import json
import mmap
import os
import stat
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dape_engine.errors import SettingsError
from dape_server.cli import cli
from dape_server.cli.bench_serve import _peer
from dape_server.load.measure import Plan, _check, summary
from dape_server.load.process import running
from dape_server.load.records import Record
from dape_server.load.scrape import anonymous_memory
from models import write_model


@pytest.mark.client
def test_the_server_is_measured_beside_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    folder = write_model(tmp_path / "tiny")
    program = tmp_path / "llama-server"
    program.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --port ]; do shift; done\n'
        f'exec {sys.executable} -m dape_server serve {folder} --port "$2"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    target = tmp_path / "serve.json"
    result = CliRunner().invoke(
        cli,
        [
            *("bench", "serve", str(folder), "--streams", "2", "--prompt-tokens", "20", "--requests", "2"),
            *("--output-tokens", "8", "--scored", "40", "--repeats", "1", "--json", str(target)),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    assert written["plan"]["streams"] == 2
    figures = written["models"]["tiny"]
    own, peer = figures["streaming"], figures["peer"]
    assert peer["name"] == "llama-server"
    assert min(own.values()) > 0
    for name, over in peer["own_over_peer"].items():
        assert over == pytest.approx(own[name] / peer["streaming"][name])
    assert own["model_share"] < own["step_share"] <= 1
    assert figures["http_over_engine_alone"] == pytest.approx(
        own["output_tokens_per_s"] / figures["engine_alone_tokens_per_s"]
    )
    assert figures["scored_tokens_per_s"]["40"] > 0


def test_ratios_are_taken_within_rounds() -> None:
    own = [{"output_tokens_per_s": speed} for speed in (100.0, 200.0, 50.0)]
    peer = [{"output_tokens_per_s": speed} for speed in (50.0, 100.0, 25.0)]
    figures = summary({"a": own, "b": peer}, [200.0, 400.0, 100.0], "a", "b")
    assert figures["streaming"] == {"output_tokens_per_s": 100.0}
    assert figures["peer"]["own_over_peer"] == {"output_tokens_per_s": 2.0}
    assert figures["http_over_engine_alone"] == 0.5
    assert "peer" not in summary({"a": own}, [1.0, 1.0, 1.0], "a", None)


def test_a_run_with_a_failed_or_short_answer_has_no_figures() -> None:
    plan = Plan(prompt_tokens=3, output_tokens=4)
    good = Record("stream", 0.0, 200, prompt_tokens=3, output_tokens=4)
    _check("it", [good], plan)
    short = Record("stream", 0.0, 200, prompt_tokens=3, output_tokens=2)
    with pytest.raises(SettingsError, match="counted 3 \\+ 2 tokens, expected 3 \\+ 4"):
        _check("it", [good, short], plan)
    with pytest.raises(SettingsError, match="429"):
        _check("it", [good, Record("stream", 0.0, 429)], plan)


def test_a_peer_that_is_not_there_is_left_out_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert _peer("none") is None
    assert _peer("auto") is None
    with pytest.raises(SettingsError, match="llama-server"):
        _peer("llama-server")


def test_a_server_that_ends_at_once_says_why() -> None:
    command = ["sh", "-c", "echo no such model >&2; exit 3"]
    with pytest.raises(SettingsError, match="exit code 3: no such model"), running("it", command, 1, "/", {}):
        pass


def test_memory_of_a_process_is_its_own() -> None:
    before = anonymous_memory(os.getpid())
    # Memory from the heap may have been the process's own before.
    with mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(bytes(32 << 20))
        assert anonymous_memory(os.getpid()) - before > 16 << 20
