"""`dape score` of folders and lines of JSON, and its folder of progress, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dape_engine.errors import SettingsError
from dape_engine.statistics import Statistics
from dape_server.cli import cli
from dape_server.cli.documents import Document, find_documents
from dape_server.cli.score_log import SCORES, Outcome, ScoreLog
from dape_server.cli.score_rows import Row
from models import TEXT, write_model

WINDOWS = ["--window", "sliding", "--context-length", "50", "--kv-cache-memory", "1MiB", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "b/one.txt").write_text(TEXT[0], encoding="utf-8")
    (folder / "a.txt").write_bytes(b"It was\r\nthe best\rof times")
    lines = [{"text": TEXT[0][:90]}, {"text": "age of wisdom 🙂", "id": 7}]
    (folder / "c.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    (folder / "d.bin").write_bytes(b"\xff")
    return folder


def dape(*arguments: object) -> Result:
    words = ["score", *map(str, arguments), *WINDOWS]
    return CliRunner().invoke(cli, words, catch_exceptions=False, env={"COLUMNS": "300"})


def outcome(document: Document, nll: float = 1.5) -> Outcome:
    return Outcome(document, (Row("full", Statistics(2, nll, nll**2, 9)),))


def test_a_folder_holds_its_documents_in_order(texts: Path) -> None:
    documents = find_documents([str(texts), str(texts / "a.txt")])
    names = [document.name.removeprefix(f"{texts}/") for document in documents]
    assert names == ["a.txt", "b/one.txt", "c.jsonl:1", "c.jsonl:3"]
    read = [document.read() for document in documents]
    assert read == ["It was\nthe best\nof times", TEXT[0], TEXT[0][:90], "age of wisdom 🙂"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "field 'text'"),
        ('{"a": 1}', "field 'text'"),
        ('{"text": 3}', "must be a text, got a int"),
        ("{", "field 'text'"),
    ],
)
def test_lines_without_a_text_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(line)
    [document] = find_documents([str(path)])
    with pytest.raises(SettingsError, match=said) as raised:
        document.read()
    assert f"{path}:1" in raised.value.message


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds no file that ends with one of \.txt"):
        find_documents([str(tmp_path)])


def test_the_log_holds_what_is_done(tmp_path: Path) -> None:
    documents = [Document(name, name, size=5) for name in "abc"]
    folder, settings = tmp_path / "log", {"window": "full", "yarn": None}
    done = [outcome(documents[0], 0.1 + 0.2), Outcome(documents[1], error="b: too short")]
    with ScoreLog(folder, settings) as log:
        assert log.finished(documents) == {}
        for one in done:
            log.add(one)
    with ScoreLog(folder, settings) as log:
        assert log.finished(documents) == {"a": done[0], "b": done[1]}
        # A document that has changed is another one.
        assert log.finished([Document("a", "a", size=6)]) == {}


def test_a_line_that_was_cut_off_is_none(tmp_path: Path) -> None:
    documents = [Document(name, name, size=5) for name in "ab"]
    with ScoreLog(tmp_path, {}) as log:
        for document in documents:
            log.add(outcome(document))
    path = tmp_path / SCORES
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with ScoreLog(tmp_path, {}) as log:
        assert list(log.finished(documents)) == ["a"]
        log.add(outcome(documents[1]))
    assert path.read_bytes() == whole


def test_a_log_is_of_one_scoring_and_one_process(tmp_path: Path) -> None:
    with ScoreLog(tmp_path, {"stride": 4}), pytest.raises(SettingsError, match="another process uses it"):
        ScoreLog(tmp_path, {"stride": 4})
    with pytest.raises(SettingsError, match="stride was 4 there and is 8 now"):
        ScoreLog(tmp_path, {"stride": 8})


def test_progress_gives_the_sums_of_a_plain_run_and_scores_nothing_again(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("plain", "first", "second")}
    dape(model, texts, "--json", files["plain"])
    arguments = (model, texts, "--progress", tmp_path / "log", "--json")
    dape(*arguments, files["first"])
    lines = (tmp_path / "log" / SCORES).read_bytes()
    cut = lines[: lines.index(b"\n") + 1]
    (tmp_path / "log" / SCORES).write_bytes(cut + lines[len(cut) : len(cut) + 20])
    dape(*arguments, files["second"])
    assert (tmp_path / "log" / SCORES).read_bytes() == lines
    assert files["second"].read_text() == files["first"].read_text()
    sums = {name: _sums(json.loads(path.read_text())) for name, path in files.items()}
    assert sums["first"] == sums["plain"]
    # Everything is done: no engine is made.
    monkeypatch.setattr("dape_server.cli.score_many.Scorer", None)
    assert "all files" in dape(*arguments, files["second"]).output


def _sums(files: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[Any, ...]]]:
    return {name: [(row["num_scored"], row["nll_sum"]) for row in rows] for name, rows in files.items()}


def test_documents_that_cannot_be_scored_are_named(model: Path, texts: Path, tmp_path: Path) -> None:
    (texts / "e.txt").write_text("")
    result = dape(model, texts, "--progress", tmp_path / "log")
    assert f"not scored: {texts / 'e.txt'}: input has" in result.output
    assert "all files" in result.output
    for path in texts.rglob("*.[tj]*"):
        path.unlink()
    (texts / "e.txt").write_text("")
    with pytest.raises(SettingsError, match="none of the 1 documents could be scored"):
        dape(model, texts, "--progress", tmp_path / "log")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2"], "--workers: has no meaning without --ray"),
        (["--ray-address", "auto"], "--ray-address: has no meaning without --ray"),
        (["--progress", "log", "--plot", "x.png"], "--plot: cannot be combined"),
        (["--ray", "--reference", "x.json"], "--reference: cannot be combined"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    model: Path, texts: Path, options: list[str], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        dape(model, texts, *options)
