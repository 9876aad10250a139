"""Sweeps: their order, that a killed one loses nothing, and that bad files are refused in one line."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dape_engine.errors import SettingsError
from dape_engine.weights import load_config
from dape_server.cli.sweep_status import status_table
from dape_server.cli.train import train
from dape_training import checkpoint
from dape_training.files import whole_file, write_json
from dape_training.run_folder import Progress, last_progress
from dape_training.sweep import Job, load_sweep, plan
from dape_training.sweep_workers import train_jobs
from dape_training.trainer import train as train_trainer
from models import TEXT

EXPERIMENTS = Path(__file__).resolve().parent.parent / "configs" / "experiments"
SWEEPS = sorted(EXPERIMENTS.glob("train*.yaml"))


@pytest.fixture
def settings() -> dict[str, Any]:
    """A sweep of two runs, one with two seeds, on two data sets."""
    data = {"train_data": "text.jsonl", "valid_data": "text.jsonl"}
    return {
        "base": {
            "model": {
                "vocab_size": 300,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "train_length": 16,
                "max_model_len": 64,
            },
            "batch_size": 2,
            "steps": 3,
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-3,
            "warmup_steps": 1,
            "precision": "no",
            "threads": 1,
            "checkpoint_every": 2,
        },
        "datasets": {"first": data, "second": data},
        "runs": {
            "kerple": {"label": "Kerple", "seeds": [1, 2], "model": {"position": {"kind": "kerple"}}},
            "dape": {
                "label": "DAPE",
                "static": "kerple",
                "model": {"position": {"kind": "kerple"}, "dape": {"width": 4}},
            },
        },
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": TEXT[0] * 3}) + "\n" for _ in range(5)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return tmp_path


def jobs_of(settings: dict[str, Any], corpus: Path, **overrides: Any) -> list[Job]:
    path = corpus / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return plan(load_sweep(path), corpus / "out", corpus, overrides)


def test_key_runs_come_first_on_every_data_set_then_the_rest_then_further_seeds(
    settings: dict[str, Any], corpus: Path
) -> None:
    names = [job.name for job in jobs_of(settings, corpus)]
    assert names == [
        "first/kerple/seed-1",
        "second/kerple/seed-1",
        "first/dape/seed-1",
        "second/dape/seed-1",
        "first/kerple/seed-2",
        "second/kerple/seed-2",
    ]


def test_a_run_may_have_some_of_the_data_sets(settings: dict[str, Any], corpus: Path) -> None:
    settings["runs"]["dape"]["datasets"] = ["second"]
    names = [job.name for job in jobs_of(settings, corpus)]
    assert [name for name in names if "dape" in name] == ["second/dape/seed-1"]


def test_runs_replace_nested_settings_of_the_base(settings: dict[str, Any], corpus: Path) -> None:
    settings["base"]["model"]["dape"] = {"width": 8, "form": "concat"}
    dape = jobs_of(settings, corpus, batch_size=5)[2]
    assert (dape.config.model.dape.width, dape.config.model.dape.form) == (4, "concat")  # type: ignore[union-attr]
    assert (dape.config.batch_size, dape.config.seed) == (5, 1)
    assert dape.config.train_data == corpus / "text.jsonl"


def test_a_sweep_shares_the_tokenizer_and_survives_a_failing_run(
    settings: dict[str, Any], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["runs"]["kerple"]["seeds"] = [1]
    jobs = jobs_of(settings, corpus)[::3]
    # The first run cannot write its metrics.
    (jobs[0].folder / "metrics.jsonl").mkdir(parents=True)
    assert train_jobs(jobs, workers=2) == [jobs[0]]
    assert "IsADirectoryError" in (jobs[0].folder / "train.log").read_text()
    assert (jobs[1].name, jobs[1].finished) == ("second/dape/seed-1", True)
    assert (jobs[1].result["steps"], jobs[1].result["tokens"]) == (3, 3 * 2 * 16)
    assert load_config(jobs[1].folder / "model").dape is not None
    tokenizers = sorted(path.relative_to(corpus / "out") for path in corpus.glob("out/*/*/tokenizer.json"))
    assert tokenizers == [Path("first/data/tokenizer.json"), Path("second/data/tokenizer.json")]
    monkeypatch.setattr("dape_training.sweep_workers._train_one", None)  # a process for it would fail
    assert train_jobs(jobs[1:], workers=2) == []
    table = status_table(load_sweep(corpus / "sweep.yaml"), jobs)
    assert table.title == "1 runs done, 0 begun, 1 left"


def test_a_killed_sweep_goes_on_from_its_checkpoints(settings: dict[str, Any], corpus: Path) -> None:
    settings["base"] |= {"steps": 300, "checkpoint_every": 10}
    settings["runs"]["kerple"]["seeds"] = [1]
    del settings["datasets"]["second"], settings["runs"]["dape"]
    [job] = jobs_of(settings, corpus)
    command = [sys.executable, "-c", "from dape_server.cli import main; main()"]
    command += ["train", "--sweep", "sweep.yaml", "--out", "out"]
    for number, exit_code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 1)):
        before = last_progress(job.folder).step
        process = subprocess.Popen(command, cwd=corpus)
        while last_progress(job.folder).step == before:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
            assert process.returncode is None
        process.send_signal(number)
        assert process.wait() == exit_code
        # The worker of a killed parent ends at a checkpoint of its own.
        with (job.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    assert not job.finished
    assert train_trainer(job.config, job.folder, shared=job.shared)
    train_trainer(job.config, corpus / "unbroken", shared=job.shared)
    assert curve(job.folder) == pytest.approx(curve(corpus / "unbroken"), abs=1e-3)


def curve(folder: Path) -> dict[int, float]:
    """The loss of every step that was logged; every step once, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in losses] == list(range(10, 301, 10))
    return dict(losses)


def test_a_checkpoint_cut_short_leaves_the_one_before(
    settings: dict[str, Any], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs_of(settings, corpus, steps=30, checkpoint_every=10)[0]
    publish = checkpoint.publish_folder

    def cut_short(new: Path, path: Path) -> None:
        if path.name == "step-20":
            next(new.glob("*.safetensors")).write_bytes(b"half")
            raise KeyboardInterrupt
        publish(new, path)

    monkeypatch.setattr(checkpoint, "publish_folder", cut_short)
    with pytest.raises(KeyboardInterrupt):
        train_trainer(job.config, job.folder)
    assert last_progress(job.folder).step == 10
    monkeypatch.undo()
    assert train_trainer(job.config, job.folder)
    assert [path.name for path in (job.folder / "checkpoints").iterdir()] == ["step-30"]


def test_a_run_that_is_asked_to_stop_saves_a_checkpoint(settings: dict[str, Any], corpus: Path) -> None:
    job = jobs_of(settings, corpus, steps=30, checkpoint_every=100)[0]
    assert not train_trainer(job.config, job.folder, stop=lambda: True)
    assert last_progress(job.folder) == Progress(1, last_progress(job.folder).seconds)
    assert job.share_done == pytest.approx(1 / 30)
    assert not job.finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {}}, "runs: Dictionary should have at least 1 item"),
        ({"speed": 3}, "speed: Extra inputs are not permitted"),
        ({"runs": {"a": {"label": "A", "static": "b"}}}, "runs.a.static: there is no run 'b'"),
        ({"runs": {"a": {"label": "A", "seeds": [1, 1]}}}, r"runs.a.seeds: \[1, 1\] holds a seed twice"),
        ({"runs": {"a": {"label": "A", "datasets": ["x"]}}}, "runs.a.datasets: there is no data set 'x'"),
        ({"runs": {"a/b": {"label": "A"}}}, "runs.a/b"),
        ({"runs": {"a": {"label": "A", "model": {"position": {"kind": "x"}}}}}, "model.position.kind"),
    ],
)
def test_bad_sweeps_are_refused(
    settings: dict[str, Any], corpus: Path, change: dict[str, Any], message: str
) -> None:
    path = corpus / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings | change))
    with pytest.raises(SettingsError, match=message):
        run_command("--sweep", str(path), "--out", str(corpus / "out"))
    assert not (corpus / "out").exists()


def test_a_folder_with_other_settings_is_refused(settings: dict[str, Any], corpus: Path) -> None:
    jobs = jobs_of(settings, corpus)
    jobs[1].begin()
    run_command("--sweep", str(corpus / "sweep.yaml"), "--out", str(corpus / "out"), "--status")
    with pytest.raises(SettingsError, match="kerple/seed-1 holds a run with other settings: steps was 3"):
        run_command("--sweep", str(corpus / "sweep.yaml"), "--out", str(corpus / "out"), "--set", "steps=4")


def test_one_of_config_and_sweep_is_asked_for() -> None:
    with pytest.raises(SettingsError, match="expected --config or --sweep"):
        run_command("--status")


def run_command(*arguments: str) -> None:
    CliRunner().invoke(train, arguments, catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_is_valid(path: Path) -> None:
    jobs = plan(load_sweep(path), Path("out"), Path("corpus"), {})
    assert len({job.folder for job in jobs}) == len(jobs)
    assert {job.config.model.train_length for job in jobs} == {128}


def test_a_file_cut_short_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "numbers.json"
    write_json(path, [1])
    with suppress(KeyboardInterrupt), whole_file(path) as new:
        new.write_text("[2")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == [1]
    assert list(path.parent.iterdir()) == [path]
