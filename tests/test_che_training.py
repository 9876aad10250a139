"""CHE models: attention in both directions, what placeholders see, runs, sweeps and reports."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from pydantic import ValidationError
from torch import Tensor

from dape_engine.config import DapeConfig, PositionConfig
from dape_engine.errors import DapeError, SettingsError
from dape_kernels.encoding import Encoding
from dape_kernels.reference import adapt, reference_attention
from dape_server.cli import cli, main
from dape_training.che import attention
from dape_training.che import run as runs
from dape_training.che.attention import whole_attention
from dape_training.che.config import CheConfig, EncodingSettings, Run, RunSettings, load_che_config
from dape_training.che.model import CheModel, Setup
from dape_training.che.run import accuracy_by_length, build, load_trained, perform, read_result
from dape_training.che.sweep import perform_if_free
from dape_training.che.tasks import TASKS
from layers import LAYERS, random_encoding

CONFIG = Path(__file__).parent.parent / "configs" / "experiments" / "che.yaml"
POINTWISE = [
    name for name, (_, dape) in LAYERS.items() if name != "cope" and (dape is None or dape.version == 1)
]
SMALL: dict[str, Any] = {
    "layers": 2,
    "heads": 2,
    "hidden": 16,
    "train_up_to": 4,
    "batch_size": 32,
    "learning_rate": 1e-2,
    "dropout": 0.0,
    "test_lengths": [3, 4, 6, 9],
    "test_samples": 64,
}


def qkv(sequences: int, tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sequences, tokens, 4, 6, generator=generator, dtype=torch.float64) for _ in range(3)]


def naive(query: Tensor, key: Tensor, value: Tensor, encoding: Encoding, positions: Tensor) -> Tensor:
    """Attention in both directions with every score stored; |i - j| pair by pair."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) * encoding.scale
    places = positions.tolist()
    columns = [
        torch.stack(
            [encoding.static_bias(torch.tensor(max(i, j)), torch.tensor(min(i, j))) for i in places], -1
        )
        for j in places
    ]
    bias = torch.stack(columns, -1).to(scores.dtype)
    dape = encoding.dape
    scores = scores + bias if dape is None else adapt(scores, bias.expand_as(scores), dape)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("positions", [list(range(11)), [0, 1, 5, 6, 7, 12, 20, 21, 40, 90, 1000]])
def test_both_directions_are_attention_over_all_pairs(name: str, positions: list[int]) -> None:
    encoding = random_encoding(LAYERS[name], 4, 6)
    place = torch.tensor(positions)
    actual = whole_attention(*qkv(3, 11), encoding, place, causal=False)
    assert torch.allclose(actual, naive(*qkv(3, 11), encoding, place), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", POINTWISE)
def test_causal_attention_is_that_of_the_engine(name: str) -> None:
    encoding = random_encoding(LAYERS[name], 4, 6)
    actual = whole_attention(*qkv(3, 11), encoding, torch.arange(11), causal=True)
    expected = reference_attention(*(t.transpose(1, 2) for t in qkv(3, 11)), encoding).transpose(1, 2)
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pairs", [1, 50, 300])
def test_blocks_change_neither_outputs_nor_gradients(
    causal: bool, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = random_encoding(LAYERS["fire-v1"], 4, 6)
    results = []
    for block in (pairs, 10**6):
        monkeypatch.setattr(attention, "BLOCK_PAIRS", block)
        inputs = [tensor.requires_grad_() for tensor in qkv(5, 9)]
        output = whole_attention(*inputs, encoding, torch.arange(9), causal=causal)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_the_naive_form() -> None:
    settings = PositionConfig(kind="kerple")
    module = CheModel(
        TASKS["even_pairs"], settings, DapeConfig(width=5), layers=1, heads=4, hidden=24, dropout=0.0,
        setup="bidirectional", longest=9,
    ).double()  # fmt: skip
    position = module.decoder.encodings[0]
    gradients = []
    for attend in (
        lambda *a: whole_attention(*a, torch.arange(9), causal=False),
        lambda *a: naive(*a, torch.arange(9)),
    ):
        module.zero_grad()
        attend(*qkv(3, 9), position.encoding()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in position.parameters()])
    assert len(gradients[0]) == 6
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)
        assert a.abs().sum() > 0


def make_run(
    task: str = "even_pairs", encoding: str = "kerple", setup: Setup = "bidirectional", **more: Any
) -> Run:
    settings = EncodingSettings(position=PositionConfig(kind=encoding), dape=DapeConfig(width=4))  # type: ignore[arg-type]
    return Run(
        task=task,
        encoding_name=encoding,
        encoding=settings,
        setup=setup,
        seed=1,
        settings=RunSettings(**{**SMALL, "steps": 3, **more}),
    )


@pytest.mark.parametrize("setup", ["bidirectional", "causal"])
def test_answers_see_the_whole_input_and_causal_ones_no_later_placeholder(setup: Setup) -> None:
    model = build(make_run("reverse_string", setup=setup)).eval()
    inputs = torch.tensor([[0, 1, 1, 0]])
    logits = model(inputs, torch.arange(8))
    assert logits.shape == (1, 4, 2)
    for place in range(4):
        changed = inputs.clone()
        changed[0, place] ^= 1
        assert (model(changed, torch.arange(8)) - logits).abs().amin() > 0
    more = model(inputs, torch.arange(10))[:, :4]
    assert torch.allclose(more, logits, atol=1e-6) == (setup == "causal")


def test_a_causal_model_is_the_engines_decoder() -> None:
    run = make_run("stack_manipulation", "alibi", "causal")
    model = build(run).eval()
    inputs = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(0))

    def attend(layer: int, *qkv: Tensor) -> Tensor:
        encoding = model.decoder.encodings[layer].encoding()
        return reference_attention(*(tensor.transpose(1, 2) for tensor in qkv), encoding).transpose(1, 2)

    tokens = torch.cat([inputs, torch.full((3, 5), 5)], 1)
    hidden = model.decoder(tokens, torch.arange(9), attend)
    expected = model.decoder.final_linear(hidden)[:, -5:, :3]
    assert torch.allclose(model(inputs, torch.arange(9)), expected, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = build(make_run(dropout=0.5))
    inputs = torch.tensor([[0, 1, 1]])
    once, again = (model(inputs, torch.arange(4)) for _ in range(2))
    assert not torch.equal(once, again)
    model.eval()
    once, again = (model(inputs, torch.arange(4)) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("setup", ["bidirectional", "causal"])
def test_a_run_learns_and_its_result_is_that_of_its_weights(setup: Setup, tmp_path: Path) -> None:
    run = make_run("missing_duplicate", setup=setup, steps=100)
    result = perform(run, tmp_path)
    assert result["trained_lengths_score"] > 0.8
    assert result["score"] == pytest.approx(np.mean([result["accuracy"][length] for length in (6, 9)]))
    assert result["accuracy"] == accuracy_by_length(load_trained(run, tmp_path), run)
    assert read_result(tmp_path) == json.loads(json.dumps(result))
    curve = result["training"]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["step"] == 100


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(steps=20, dropout=0.1, max_position=200)
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)
    whole = perform(run, tmp_path / "whole")

    def kill(step: int, _: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(run, tmp_path / "killed", kill)
    assert read_result(tmp_path / "killed") is None
    went_on = perform(run, tmp_path / "killed")
    assert went_on["accuracy"] == whole["accuracy"]
    assert went_on["training"]["curve"] == whole["training"]["curve"]


def test_weights_of_another_run_are_refused_and_other_tests_are_not(tmp_path: Path) -> None:
    perform(make_run(), tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        perform(make_run(hidden=8), tmp_path)
    assert set(perform(make_run(test_lengths=[5]), tmp_path)["accuracy"]) == {5}


def test_tests_shrink_with_the_pairs_that_they_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("reverse_string", test_lengths=[4, 20, 100], test_pairs=8000)
    counted: dict[int, int] = {}
    model = build(run)
    sample = type(model.task).sample

    def count(task: Any, generator: np.random.Generator, number: int, length: int) -> Any:
        counted[length] = counted.get(length, 0) + number
        return sample(task, generator, number, length)

    monkeypatch.setattr(type(model.task), "sample", count)
    monkeypatch.setattr(runs, "TEST_TOKENS", 100)
    accuracy_by_length(model, run)
    assert counted == {4: 64, 20: 8000 // 40**2, 100: 1}


def test_randomised_positions_ascend_below_their_limit() -> None:
    settings = RunSettings(**{**SMALL, "max_position": 30})
    examples = TASKS["reverse_string"].sample(np.random.default_rng(0), 2, 9)
    positions = [runs._positions(examples, settings, np.random.default_rng(seed)) for seed in range(50)]
    assert all(len(p) == 18 and (p.diff() > 0).all() and p[0] >= 0 and p[-1] < 30 for p in positions)
    assert {int(p[-1]) for p in positions} > {28, 29}
    plain = runs._positions(examples, RunSettings(**SMALL), np.random.default_rng(0))
    assert plain.tolist() == list(range(18))


def test_the_shipped_sweep_has_every_task_and_the_table_s_encodings() -> None:
    config = load_che_config(CONFIG, {}, {})
    assert sorted(config.tasks) == sorted(TASKS)
    statics = {"kerple", "alibi", "fire", "nope"}
    assert set(config.encodings) == statics | {f"dape-{name}" for name in statics} | {"rope"}
    assert all(
        config.encodings[f"dape-{name}"].position == config.encodings[name].position for name in statics
    )
    order = [(run.encoding_name, run.task) for run in config.runs()]
    assert order[:15] == [("kerple", task) for task in config.tasks]
    assert order[15] == ("dape-kerple", config.tasks[0])
    assert len(set(order)) == len(order) == 135


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["sorting"]}, "unknown task 'sorting', expected one of even_pairs"),
        ({"run": {"hidden": 30, "heads": 8}}, "hidden 30 is not a multiple of heads 8"),
        ({"run": {"test_lengths": [40]}}, "test_lengths holds nothing above train_up_to 40"),
        ({"run": {"max_position": 1499}}, "max_position 1499 is below 1500"),
        ({"run": {"step": 1}}, "Extra inputs are not permitted"),
        ({"encodings": {"x": {"position": {"kind": "cope"}}}}, "'cope' cannot be used for CHE models"),
        (
            {"encodings": {"x": {"position": {"kind": "nope"}, "dape": {"version": 2, "kernel": 3}}}},
            "dape.kernel must be 1 for CHE models, got 3",
        ),
        ({"encodings": {"../x": {"position": {"kind": "nope"}}}}, "should match pattern"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CheConfig.model_validate({"encodings": {"nope": {"position": {"kind": "nope"}}}, **change})


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    run = make_run()
    (tmp_path / run.folder).mkdir(parents=True)
    with (tmp_path / run.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        perform_if_free(run, tmp_path, "it")
        assert read_result(tmp_path / run.folder) is None
    perform_if_free(run, tmp_path, "it")
    assert read_result(tmp_path / run.folder) is not None


SWEEP = {
    "note": "A budget of nothing.",
    "tasks": ["even_pairs", "parity_check"],
    "encodings": {
        "nope": {"position": {"kind": "nope"}},
        "dape-nope": {"position": {"kind": "nope"}, "dape": {"width": 4}},
    },
    "seeds": [0, 1],
    "run": {**SMALL, "steps": 2},
}


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return path


def che(command: str, file: Path, *arguments: str) -> Result:
    arguments = ("che", command, "--config", str(file), "--out", str(file.parent / "out"), *arguments)
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_a_sweep_is_trained_by_workers_tested_again_and_reported(sweep_file: Path) -> None:
    out = sweep_file.parent / "out"
    assert che("train", sweep_file, "--workers", "2").exit_code == 0
    results = sorted(out.rglob("result.json"))
    assert len(results) == 8
    written = [path.stat().st_mtime_ns for path in results]
    assert che("train", sweep_file, "--workers", "1").exit_code == 0
    assert [path.stat().st_mtime_ns for path in results] == written

    sweep_file.write_text(
        yaml.safe_dump({**SWEEP, "run": {**SWEEP["run"], "test_lengths": [2, 7]}}, sort_keys=False)
    )  # type: ignore[dict-item]
    assert che("evaluate", sweep_file).exit_code == 0
    numbers, page = out / "che.json", out / "che.md"
    result = che("report", sweep_file, "--json", str(numbers), "--markdown", str(page))
    assert result.exit_code == 0
    report = json.loads(numbers.read_text())
    assert len(report["runs"]) == report["planned_runs"] == 8
    assert set(report["runs"][0]["accuracy"]) == {"2", "7"}
    assert page.read_text().rstrip() == result.output.rstrip()


def test_a_failing_worker_is_reported(sweep_file: Path) -> None:
    run = load_che_config(
        sweep_file, {"tasks": ["even_pairs"], "seeds": [0], "encodings": ["nope"]}, {}
    ).runs()[0]
    folder = sweep_file.parent / "out" / run.folder
    perform(make_run(), folder)
    (folder / "result.json").unlink()
    only = ("--task", "even_pairs", "--seed", "0", "--encoding", "nope")
    with pytest.raises(DapeError, match="1 of 1 workers failed"):
        che("train", sweep_file, *only)


def write_results(sweep_file: Path, scores: dict[tuple[str, str], tuple[float, ...]]) -> None:
    """Write results as if runs had scored so, seed by seed."""
    training = {"steps": 2, "seconds": 900.0, "parameters": 7, "curve": [{"loss": 0.5}]}
    for run in load_che_config(sweep_file, {}, {}).runs():
        if (run.task, run.encoding_name) in scores:
            score = scores[run.task, run.encoding_name][run.seed]
            folder = sweep_file.parent / "out" / run.folder
            folder.mkdir(parents=True)
            runs.write_result(run, folder, training, {4: 1.0, 6: score, 9: score})


def test_a_report_shows_means_errors_the_best_and_what_dape_gains(sweep_file: Path) -> None:
    scores = {("even_pairs", "nope"): (0.5, 0.6), ("even_pairs", "dape-nope"): (0.7, 0.9)}
    write_results(sweep_file, scores)
    text = che("report", sweep_file).output
    assert "A budget of nothing." in text
    assert "4 of 8 runs are finished; training took 1.00 core hours." in text
    assert "| R | Even Pairs | 50 | 55.0 ± 5.0 | **80.0 ± 10.0** |" in text
    assert "| R | Parity Check † | 50 |  |  |" in text
    assert "- dape-nope beats nope on 1 of 1 tasks that need positions; the mean difference is +25.0" in text
    assert "| steps | 200000 | 2 |" in text
    assert "| R | Even Pairs | 50 | **100.0 ± 0.0** | **100.0 ± 0.0** |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report",), "holds no finished run of this file"),
        (("train", "--encoding", "alibi"), "unknown encoding 'alibi', expected one of nope, dape-nope"),
        (("train", "--task", "x"), "tasks: Value error, unknown task 'x'"),
        (("train", "--setup", "both"), "setups.0: Input should be 'bidirectional' or 'causal'"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    sweep_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, *rest = arguments
    out = str(sweep_file.parent / "out")
    monkeypatch.setattr(
        "sys.argv", ["dape", "che", command, "--config", str(sweep_file), "--out", out, *rest]
    )
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(sweep_file: Path) -> None:
    write_results(sweep_file, {("even_pairs", "nope"): (0.5, 0.6)})
    for command in ("train", "report"):
        with pytest.raises(SettingsError, match="even_pairs/nope-seed0 holds a result with other settings"):
            che(command, sweep_file, "--steps", "3")
