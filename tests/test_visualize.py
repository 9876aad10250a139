"""The figure of one query's biases: what it holds, its formats, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dape_engine.errors import DapeError
from dape_engine.inspection import LayerBias
from dape_server.cli.visualize import visualize
from dape_training.figures import Curve, draw_biases, draw_curves, summarise_biases
from models import TEXT, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT[0], TEXT[0] * 2)))
    return path


def run_command(*arguments: str) -> None:
    small = ["--kv-cache-memory", "1MiB"]
    CliRunner().invoke(visualize, [*arguments, *small], catch_exceptions=False, standalone_mode=False)


def test_the_figure_has_a_row_for_every_layer_asked_for(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "bias.svg"
    arguments = (str(folder), "--text", str(text), "--document", "1", "--query", "100")
    run_command(*arguments, "--layers", "1", "--out", str(out))
    drawing = out.read_text()
    assert "layer 1: adapted bias B + f(A, B)" in drawing
    assert "layer 0" not in drawing
    assert "bias at query position 100" in drawing
    run_command(*arguments, "--layers", "1", "--out", str(tmp_path / "again.svg"))
    assert (tmp_path / "again.svg").read_bytes() == out.read_bytes()
    run_command(*arguments, "--out", str(tmp_path / "bias.png"))
    assert (tmp_path / "bias.png").read_bytes().startswith(b"\x89PNG")


def test_a_plain_text_is_read_as_it_is(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "text.txt"
    plain.write_text(TEXT[0])
    run_command(str(folder), "--text", str(plain), "--query", "40", "--out", str(tmp_path / "bias.svg"))
    assert "layer 0" in (tmp_path / "bias.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"expected --out FILE, --json FILE, or both"),
        (["--out", "x.gif"], r"--out x.gif: expected a file that ends with .svg, .png, .pdf"),
        (["--out", "x.svg", "--query", "400"], r"--query 400: the text has \d+ tokens only"),
        (["--out", "x.svg", "--query", "4", "--layers", "2"], "layers: must be from 0 to 1"),
        (["--out", "x.svg", "--layers", "a"], "--layers a: expected whole numbers"),
        (["--out", "x.svg", "--document", "2"], "--document 2: .* has 2 documents"),
        (["--out", "no/x.svg", "--query", "4"], "cannot write the picture no/x.svg"),
    ],
)
def test_bad_input_is_refused(folder: Path, text: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(DapeError, match=message):
        run_command(str(folder), "--text", str(text), *arguments)


def test_a_model_without_a_bias_has_no_figure(tmp_path: Path, text: Path) -> None:
    folder = write_model(tmp_path / "nope", position={"kind": "nope"})
    with pytest.raises(DapeError, match="no bias to show: its encoding is nope"):
        run_command(str(folder), "--text", str(text), "--query", "4", "--out", str(tmp_path / "x.svg"))


def test_every_head_is_a_line_through_the_means_of_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dape_training.figures.BINS", 2)
    drawn: list[list[float]] = []

    def plot(_: object, __: object, values: list[float], **___: object) -> None:
        drawn.append(list(map(float, values)))

    monkeypatch.setattr("matplotlib.axes.Axes.plot", plot)
    static = np.array([[0, -2, -4, -6], [1, 1, 1, 1]], np.float32)
    layer = LayerBias(0, static, static, static * 2)
    with pytest.warns(UserWarning, match="No artists"):
        draw_biases(tmp_path / "x.png", summarise_biases("model", 3, (0, 1, 2, 3), [layer]))
    assert drawn == [[-1, -5], [1, 1], [-2, -10], [2, 2]]


def test_the_numbers_alone_make_the_same_figure(folder: Path, text: Path, tmp_path: Path) -> None:
    arguments = (str(folder), "--text", str(text), "--query", "40", "--json", str(tmp_path / "bias.json"))
    run_command(*arguments, "--out", str(tmp_path / "bias.svg"))
    biases = json.loads((tmp_path / "bias.json").read_text())
    assert biases["query"] == 40
    assert [layer["layer"] for layer in biases["layers"]] == [0, 1]
    draw_biases(tmp_path / "again.svg", biases)
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "bias.svg").read_bytes()


def test_curves_end_at_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "curves.svg"
    panels = [("books", [Curve("a", (128, 256), (3.0, 4.0), (0.1, 0.2)), Curve("b", (128,), (5.0,))])]
    draw_curves(path, "title", panels, xlabel="context", ylabel="perplexity", mark=128, highest=2)
    assert all(word in path.read_text() for word in ("title", "books", "context", "perplexity", ">256<"))
