"""The `dape` command as its users type it."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from dape_engine.errors import DapeError, SettingsError
from dape_kernels.attention import BACKENDS
from dape_server.cli import COMMANDS, cli, main
from dape_server.cli.options import build_settings, config_option, settings_options
from dape_server.settings import ServerSettings
from models import TEXT, write_model

SMALL = ["--kv-cache-memory", "1MiB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text(TEXT[0] * 4, encoding="utf-8")
    return str(path)


def dape(*arguments: str, **more: Any) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False, **more)


def test_help_lists_every_command() -> None:
    result = dape("--help")
    for name in COMMANDS:
        assert f"  {name} " in result.output


def test_generate_streams_the_same_text_for_the_same_seed(folder: str) -> None:
    arguments = ("generate", folder, "It was", "--max-tokens", "9", "--seed", "3", *SMALL)
    first = dape(*arguments)
    assert first.exit_code == 0
    assert len(first.output) > 1
    assert dape(*arguments).output == first.output


def test_generate_reads_the_prompt_from_standard_input(folder: str) -> None:
    greedy = ("--max-tokens", "5", "--temperature", "0", *SMALL)
    piped = dape("generate", folder, "-", *greedy, input="It was")
    assert piped.output == dape("generate", folder, "It was", *greedy).output


def test_score_prints_a_table_by_length_and_writes_numbers_and_a_plot(
    folder: str, book: str, tmp_path: Path
) -> None:
    numbers, plot = tmp_path / "out.json", tmp_path / "out.png"
    result = dape(
        "score", folder, book, "--lengths", "64,32,128", "--score-last", "16",
        "--json", str(numbers), "--plot", str(plot), *SMALL,
    )  # fmt: skip
    assert result.exit_code == 0
    rows = json.loads(numbers.read_text())[book]
    assert [(row["length"], row["num_scored"]) for row in rows] == [(32, 16), (64, 16), (128, 16)]
    for row in rows:
        assert row["bits_per_byte"] > 0
        assert f"{row['perplexity']:.3f}" in result.output.replace("\n", "")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_score_by_windows_counts_every_token_once(folder: str, book: str, tmp_path: Path) -> None:
    numbers = tmp_path / "out.json"
    for window in ("sliding", "disjoint"):
        dape(
            "score",
            folder,
            book,
            "--window",
            window,
            "--context-length",
            "50",
            "--json",
            str(numbers),
            *SMALL,
        )
        [row] = json.loads(numbers.read_text())[book]
        whole = dape("score", folder, book, "--window", "full", "--json", str(numbers), *SMALL)
        [full] = json.loads(numbers.read_text())[book]
        assert whole.exit_code == 0
        assert row["num_scored"] == full["num_scored"]
        assert row["bits_per_byte"] > 0


def test_evaluate_scores_the_same_tokens_at_every_length(folder: str, tmp_path: Path) -> None:
    data, numbers = tmp_path / "text.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps({"text": TEXT[0] * 6}) + "\n" for _ in range(2)), encoding="utf-8")
    result = dape(
        "evaluate", folder, "--data", str(data), "--lengths", "16,64,128", "--score-last", "32",
        "--ends", "2", "--json", str(numbers), "--plot", str(tmp_path / "out.png"), *SMALL,
    )  # fmt: skip
    assert result.exit_code == 0
    rows = json.loads(numbers.read_text())["models"]["tiny"]
    assert [(row["length"], row["num_scored"]) for row in rows] == [(16, 128), (64, 128), (128, 128)]
    assert [row["change"] for row in rows if row["length"] == row["change_from"]] == [0]
    assert rows[1]["stderr"] > 0


def test_backends_says_what_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["reference"]), "describe", lambda _: "brackets [are] no markup")
    result = dape("backends")
    assert "chunked" in result.output
    assert "DAPE-FIRE" in result.output
    assert "reference: brackets [are] no markup" in result.output


def test_settings_come_from_flags_then_environment_then_file(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "dape.yaml"
    config.write_text("kv-cache-memory: 0\nmax_tokens: 3\n")
    arguments = ("generate", folder, "It", "--config", str(config))
    with pytest.raises(DapeError, match="--kv-cache-memory 0"):
        dape(*arguments)
    monkeypatch.setenv("DAPE_KV_CACHE_MEMORY", "3B")
    with pytest.raises(DapeError, match="3 bytes hold 0 blocks"):
        dape(*arguments)
    assert dape(*arguments, *SMALL).exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_num_seqs: 1.5", "'1.5' is not a valid integer"),
        ("max_num_seqs: true", "'True' is not a valid integer"),
        ("max_num_seqs: {a: 1}", "max_num_seqs must be a text, a number, true or false, got a dict"),
        ("max_num_seqs: 2020-01-01", "got a date"),
        ("max_num_seqs: [1]", "got a list"),
        ("[" * 5000, "is not valid YAML"),
        ("stop: ''", "--stop"),
        ("5: 6", "the unknown option '5'"),
    ],
)
def test_files_of_settings_follow_the_rules_of_the_command_line(
    folder: str,
    tmp_path: Path,
    content: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "dape.yaml"
    config.write_text(content)
    monkeypatch.setattr(sys, "argv", ["dape", "generate", folder, "x", "--config", str(config), *SMALL])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_gives_one_text_or_several_where_an_option_may_be_repeated(tmp_path: Path) -> None:
    seen = []

    @click.command()
    @config_option
    @settings_options(ServerSettings)
    def command(**options: Any) -> None:
        settings = build_settings(ServerSettings, options)
        seen.append(([key.get_secret_value() for key in settings.api_key], settings.access_log))

    for content in ("api_key: secret\naccess_log: false", "api_key: [secret, 5]\naccess_log: null"):
        (tmp_path / "dape.yaml").write_text(content)
        CliRunner().invoke(command, ["--config", str(tmp_path / "dape.yaml")], catch_exceptions=False)
    assert seen == [(["secret"], False), (["secret", "5"], True)]


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(
            SettingsError, match=f"--port {port}: cannot listen on 127.0.0.1: Address already"
        ):
            dape("serve", "no-such-model", "--port", port)
    for host in ("no.such.host.invalid", "999.1.1.1", "x" * 300):
        with pytest.raises(SettingsError, match="--port 0: cannot listen on"):
            dape("serve", "no-such-model", "--port", "0", "--host", host)
    with pytest.raises(SettingsError, match="--host"):
        dape("serve", "no-such-model", "--host", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "y", "z"], "expected [MODEL] PROMPT"),
        (["serve", "no-such-model"], "no model folder 'no-such-model'"),
        (["generate", "FOLDER", "x", "--max-num-seqs", "0"], "--max-num-seqs 0"),
        (["generate", "FOLDER", "x", "--max-model-len", "9999"], "9999 is above the model's 512"),
        (["generate", "FOLDER", "x" * 3000], "above the limit of 512"),
        (["generate", "FOLDER", "x", "--kv-cache-memory", "1B"], "hold 0 blocks"),
        (["generate", "FOLDER", "x", "--kv-cache-memory", "1PiB"], "cannot be allocated"),
        (["generate", "FOLDER", "x", "--threads", "1000000"], "--threads 1000000"),
        (["generate", "FOLDER", "x", "--max-num-seqs", "9" * 30], "--max-num-seqs 999"),
        (["generate", "FOLDER", "x", "--temperature", "nan"], "nan is not a finite number"),
        (["generate", "FOLDER", "x", "--repetition-penalty", "inf"], "inf is not a finite number"),
        (["generate", "FOLDER", "x", "--seed", "9" * 30], "--seed"),
        (["generate", "FOLDER", "x", "--stop", ""], "--stop"),
        (["score", "FOLDER", "no-such-file"], "cannot read no-such-file: No such file"),
        (["score", "FOLDER"], "got no file"),
        (["score", "FOLDER", "BOOK", "--lengths", "a,b"], "expected whole numbers"),
        (["score", "FOLDER", "BOOK", "--lengths", "4096"], "4096"),
        (["score", "FOLDER", "BOOK", "--window", "full", "--stride", "4"], "stride has no meaning"),
        (["generate", "FOLDER", "x", "--config", "no-such.yaml"], "no-such.yaml: No such file"),
        (["train", "--config", "BOOK"], "BOOK"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    folder: str,
    book: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = {"FOLDER": folder, "BOOK": book}
    monkeypatch.setattr(sys, "argv", ["dape", *(named.get(argument, argument) for argument in arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert named.get(message, message) in error
    assert "Traceback" not in error
