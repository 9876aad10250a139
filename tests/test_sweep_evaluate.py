"""Evaluation of a sweep: equal targets for all runs, once each; what is collected; YaRN and short models."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dape_engine.errors import SettingsError
from dape_server.cli.evaluate import evaluate
from dape_training.files import write_json
from dape_training.run_folder import RESULT
from dape_training.sweep import Job, load_sweep, plan
from dape_training.sweep_evaluate import Evaluation, evaluations
from models import TEXT, write_model

SIZES = {
    "vocab_size": 304,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "train_length": 16,
    "max_model_len": 64,
}
RUNS: dict[str, Any] = {
    "kerple": {"label": "Kerple", "model": {"position": {"kind": "kerple"}}},
    "dape": {
        "label": "DAPE",
        "static": "kerple",
        "model": {"position": {"kind": "kerple"}, "dape": {"width": 8}},
    },
    "learned": {
        "label": "Learned",
        "model": {"max_model_len": 16, "position": {"kind": "learned", "max_positions": 16}},
    },
    "rope": {"label": "RoPE", "model": {"position": {"kind": "rope"}}},
    "waiting": {"label": "Not trained", "model": {"position": {"kind": "nope"}}},
}
OPTIONS = ("--lengths", "16,64", "--ends", "2", "--score-last", "8", "--kv-cache-memory", "1MiB")


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """The runs of a sweep, all but one trained: models with random weights stand for them."""
    with lzma.open(tmp_path / "text.jsonl.xz", "wt", encoding="utf-8") as lines:
        for text in (TEXT[0] * 3, TEXT[0][:40], TEXT[0] * 2):
            lines.write(json.dumps({"text": text}) + "\n")
    base = {
        "model": SIZES,
        "steps": 5,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "warmup_steps": 1,
        "batch_size": 2,
    }
    data = {"train_data": "text.jsonl.xz", "valid_data": "text.jsonl.xz"}
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"base": base, "datasets": {"books": data}, "runs": RUNS}, sort_keys=False)
    )
    jobs = plan(load_sweep(path), tmp_path / "out", tmp_path, {})
    for job in jobs[:-1]:
        model = job.config.model
        write_model(
            job.folder / "model", max_model_len=model.max_model_len, position=model.position, dape=model.dape
        )
        result = {"steps": 5, "tokens": 160, "parameters": 9, "seconds": 1.5, "validation_loss": 5.0}
        write_json(job.folder / RESULT, result)
    return jobs


def run_command(folder: Path, *arguments: str) -> None:
    places = ["--sweep", str(folder / "sweep.yaml"), "--corpus", str(folder), "--runs", str(folder / "out")]
    command = [*places, *OPTIONS, *arguments]
    CliRunner().invoke(evaluate, command, catch_exceptions=False, standalone_mode=False)


def test_finished_runs_are_scored_once_on_equal_targets(jobs: list[Job], tmp_path: Path) -> None:
    run_command(tmp_path, "--collect", str(tmp_path / "results"))
    found = json.loads((tmp_path / "results" / "sweep-books.json").read_text())
    rows = {row["run"]: row for row in found["rows"]}
    assert list(rows) == ["kerple", "dape", "learned", "rope", "rope-yarn"]
    assert rows["rope-yarn"]["label"] == "RoPE with YaRN"
    assert (found["runs_planned"], found["runs_scored"], found["steps"]) == (5, 4, 5)
    # Two ends in each document that has 64 tokens; the learned table ends at 16.
    assert [index for index, _ in found["targets"]] == [0, 0, 2, 2]
    assert {length: len(losses) for length, losses in rows["dape"]["nll"].items()} == {"16": 4, "64": 4}
    assert set(rows["learned"]["nll"]) == {"16"}
    assert rows["dape"]["static"] == "kerple"
    assert rows["dape"]["dape"]["width"] == 8
    assert rows["kerple"]["nll"] != rows["dape"]["nll"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/*/evaluation.json")}
    assert len(before) == 4
    (jobs[0].folder / "evaluation.json").unlink()
    run_command(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path for path in before if after[path] != before[path]] == [jobs[0].folder / "evaluation.json"]


def test_new_weights_are_scored_again(jobs: list[Job], tmp_path: Path) -> None:
    run_command(tmp_path)
    before = json.loads((jobs[0].folder / "evaluation.json").read_text())
    write_model(jobs[0].folder / "model", max_model_len=64, position={"kind": "alibi"})
    run_command(tmp_path)
    after = json.loads((jobs[0].folder / "evaluation.json").read_text())
    assert before["model"] != after["model"]
    assert before["nll"] != after["nll"]


def test_losses_by_position_come_from_one_full_pass(jobs: list[Job], tmp_path: Path) -> None:
    run_command(tmp_path)
    scores = json.loads((jobs[0].folder / "evaluation.json").read_text())
    # Of 64 tokens, two stretches between the edges 1, 32, 64 are whole.
    assert [len(losses) for losses in scores["position_nll"]] == [2] * 4
    run_command(tmp_path, "--score-last", "63")
    whole = json.loads((jobs[0].folder / "evaluation.json").read_text())
    for losses, mean in zip(whole["position_nll"], whole["nll"]["64"], strict=True):
        assert (31 * losses[0] + 32 * losses[1]) / 63 == pytest.approx(mean, abs=1e-5)


def test_a_rope_run_is_scored_with_yarn_as_well(jobs: list[Job], tmp_path: Path) -> None:
    assert list(evaluations(jobs[0])) == [Evaluation(jobs[0])]
    run_command(tmp_path)
    plain, stretched = (
        json.loads((jobs[3].folder / name).read_text())
        for name in ("evaluation.json", "evaluation-yarn.json")
    )
    # At the train length the factor is 1; beyond it every length has a factor of its own.
    assert stretched["nll"]["16"] == pytest.approx(plain["nll"]["16"], abs=1e-6)
    assert stretched["nll"]["64"] != pytest.approx(plain["nll"]["64"], abs=1e-3)
    assert len(stretched["position_nll"]) == len(plain["position_nll"]) == 4


def test_bad_arguments_are_refused(jobs: list[Job], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--sweep takes data and models from its file"):
        run_command(tmp_path, "--data", str(tmp_path / "text.jsonl.xz"))
    with pytest.raises(SettingsError, match="expected --data FILE, or --sweep FILE"):
        CliRunner().invoke(evaluate, [], catch_exceptions=False, standalone_mode=False)
    for job in jobs[:-1]:
        (job.folder / RESULT).unlink()
    with pytest.raises(SettingsError, match=r"no run of .* is finished"):
        run_command(tmp_path)
