"""`dape score`: several files, beginnings, and the comparison with an earlier run."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure

from dape_engine.errors import DapeError, SettingsError
from dape_server.cli import cli
from dape_server.cli.score_rows import merged
from models import TEXT, plain_logprobs, write_model

SMALL = ["--kv-cache-memory", "1MiB"]
BY_LENGTH = ["--lengths", "32,64", "--score-last", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "other", position={"kind": "alibi"})


@pytest.fixture
def books(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for number, path in enumerate(paths):
        path.write_text(TEXT[0][number * 9 :] * 3, encoding="utf-8")
    return [str(path) for path in paths]


def dape(*arguments: object) -> Result:
    words = ["score", *map(str, arguments), *SMALL]
    return CliRunner().invoke(cli, words, catch_exceptions=False, env={"COLUMNS": "300"})


def floats(row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(row["token_logprobs"]), "<f4").astype(float)


def integers(row: dict[str, Any]) -> list[int]:
    return np.frombuffer(base64.b64decode(row["token_ids"]), "<i4").tolist()


def test_rows_hold_the_values_of_their_tokens(folder: Path, books: list[str], tmp_path: Path) -> None:
    numbers = tmp_path / "out.json"
    dape(folder, books[0], *BY_LENGTH, "--json", numbers)
    rows = json.loads(numbers.read_text())[books[0]]
    dape(folder, books[0], "--window", "full", "--json", numbers)
    [whole] = json.loads(numbers.read_text())[books[0]]
    count = whole["num_scored"] + 1
    assert whole["scored"] == [[1, count]]
    for row in rows:
        assert row["scored"] == [[count - 16, count]]
        assert integers(row) == integers(whole)[-16:]
        assert -floats(row).sum() == pytest.approx(row["nll_sum"], rel=1e-5)
    # With 64 tokens in the window, as a plain forward pass has it.
    ids = integers(whole)[-64:]
    plain = plain_logprobs(folder, ids)
    expected = [float(plain[place - 1, ids[place]]) for place in range(48, 64)]
    assert floats(rows[1]) == pytest.approx(expected, abs=1e-4)


def test_several_files_are_summed(folder: Path, books: list[str], tmp_path: Path) -> None:
    numbers = tmp_path / "out.json"
    result = dape(folder, *books, *BY_LENGTH, "--json", numbers)
    files = json.loads(numbers.read_text())
    assert list(files) == books
    for place, length in enumerate((32, 64)):
        rows = [rows[place] for rows in files.values()]
        perplexity = np.exp(sum(row["nll_sum"] for row in rows) / 32)
        line = result.output[result.output.index("all files") :].splitlines()[place]
        assert line.removeprefix("all files").split()[:2] == [str(length), "32"]
        assert f"{perplexity:.3f} ±" in line


@pytest.mark.parametrize("settings", [BY_LENGTH, ["--window", "sliding", "--context-length", "50"]])
def test_a_reference_is_compared_token_by_token(
    folder: Path, other_folder: Path, books: list[str], tmp_path: Path, settings: list[str]
) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    dape(other_folder, *books, *settings, "--json", before)
    result = dape(folder, *books, *settings, "--json", after, "--reference", before)
    deltas = []
    for name, rows in json.loads(after.read_text()).items():
        for row, other in zip(rows, json.loads(before.read_text())[name], strict=True):
            delta = floats(other) - floats(row)
            deltas.append(delta)
            found = row["paired_difference"]
            assert found["num_paired"] == row["num_scored"] == len(delta)
            assert found["mean_difference"] == pytest.approx(delta.mean(), abs=1e-5)
            assert found["stderr"] == pytest.approx(delta.std(ddof=1) / len(delta) ** 0.5, abs=1e-5)
            assert found["perplexity_ratio"] == pytest.approx(np.exp(delta.mean()), rel=1e-5)
            assert f"{found['mean_difference']:+.4f} ± {found['stderr']:.4f}" in result.output
            assert abs(found["mean_difference"]) > 0.01
    if "--window" in settings:
        assert f"{np.concatenate(deltas).mean():+.4f} ±" in result.output.split("all files")[1]


def test_windows_are_compared_where_both_score(folder: Path, books: list[str], tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    dape(folder, books[0], "--window", "last", "--score-last", "20", "--json", before)
    dape(folder, books[0], "--window", "full", "--json", after, "--reference", before)
    [row] = json.loads(after.read_text())[books[0]]
    assert row["paired_difference"]["num_paired"] == 20
    assert row["paired_difference"]["mean_difference"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        (BY_LENGTH, "context length (tokens)"),
        (["--window", "sliding", "--context-length", "200"], "tokens before, fewer than"),
    ],
    ids=["lengths", "positions"],
)
def test_a_plot_draws_the_reference_too(
    folder: Path,
    other_folder: Path,
    books: list[str],
    tmp_path: Path,
    settings: list[str],
    label: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, after, plot = tmp_path / "before.json", tmp_path / "after.json", tmp_path / "out.png"
    drawn: list[Any] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **more: drawn.append(self) or savefig(self, *a, **more)
    )
    dape(other_folder, *books, *settings, "--json", before)
    dape(folder, *books, *settings, "--reference", before, "--plot", plot, "--json", after)
    assert plot.read_bytes().startswith(b"\x89PNG")
    [figure] = drawn
    [axes] = figure.axes
    assert axes.get_xlabel() == label
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    lines |= {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}
    for name in books:
        for path, title in ((after, name), (before, f"{name}: reference")):
            rows = json.loads(path.read_text())[name]
            points = [[part["to"], part["perplexity"]] for row in rows for part in row.get("by_position", ())]
            points = points or [[row["length"], row["perplexity"]] for row in rows]
            assert len(points) > 1
            assert lines[title] == points


def test_a_beginning_of_text_token_counts_as_context(folder: Path, books: list[str], tmp_path: Path) -> None:
    numbers = tmp_path / "out.json"
    rows = {}
    for bos in ("never", "always"):
        dape(folder, books[0], "--window", "full", "--bos", bos, "--json", numbers)
        [rows[bos]] = json.loads(numbers.read_text())[books[0]]
    assert rows["always"]["num_scored"] == rows["never"]["num_scored"] + 1
    assert integers(rows["always"])[1:] == integers(rows["never"])


def test_half_windows_begin_with_bos_where_the_text_does(
    folder: Path, books: list[str], tmp_path: Path
) -> None:
    numbers = tmp_path / "out.json"
    dape(folder, books[0], "--window", "full", "--bos", "always", "--json", numbers)
    [whole] = json.loads(numbers.read_text())[books[0]]
    half = ["--window", "half", "--context-length", "20"]
    dape(folder, books[0], *half, "--bos", "always", "--json", numbers)
    [row] = json.loads(numbers.read_text())[books[0]]
    ids = [0, *integers(whole)]
    second = [0, *ids[21:40]]
    plain = plain_logprobs(folder, second)
    expected = [float(plain[place - 1, second[place]]) for place in range(11, 20)]
    assert floats(row)[9:18] == pytest.approx(expected, abs=1e-4)


def test_a_short_file_is_scored_at_its_own_length(folder: Path, tmp_path: Path) -> None:
    short, numbers = tmp_path / "short.txt", tmp_path / "out.json"
    short.write_text("It was the best of times")
    dape(folder, short, "--json", numbers)
    [row] = json.loads(numbers.read_text())[str(short)]
    assert row["length"] == row["num_scored"] + 1 < 128


def test_ranges_are_merged() -> None:
    assert merged([(1, 4), (4, 6), (8, 9), (9, 10)]) == ((1, 6), (8, 10))
    assert merged([]) == ()


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot read --reference .*: No such file"),
            ("{", "was not written by"),
            ("[]", "was not written by"),
            ('{"x": [{"length": 32}]}', "was not written by .*perplexity"),
            ("{}", "holds no row of .*one.txt for length 32"),
        ],
    )
    def test_no_reference(
        self, folder: Path, books: list[str], tmp_path: Path, content: str | None, message: str
    ) -> None:
        path = tmp_path / "reference.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(SettingsError, match=message):
            dape(folder, books[0], *BY_LENGTH, "--reference", path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"token_ids": "AAAA"}, "array of .* holds 3 bytes"),
            ({"token_ids": "?"}, "is not base64"),
            ({"token_logprobs": ""}, "differ in length"),
            ({"scored": [[0, 16]]}, "no scored token of .* in common"),
            ({"token_ids": base64.b64encode(bytes(64)).decode()}, "another text or had another tokenizer"),
        ],
    )
    def test_another_text(
        self, folder: Path, books: list[str], tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        path = tmp_path / "reference.json"
        dape(folder, books[0], *BY_LENGTH, "--json", path)
        rows = json.loads(path.read_text())
        rows[books[0]][1] |= change
        path.write_text(json.dumps(rows))
        with pytest.raises(SettingsError, match=message):
            dape(folder, books[0], *BY_LENGTH, "--reference", path)

    def test_numbers_that_cannot_be_written(self, folder: Path, books: list[str], tmp_path: Path) -> None:
        with pytest.raises(DapeError, match="cannot write"):
            dape(folder, books[0], *BY_LENGTH, "--json", tmp_path / "none" / "out.json")
