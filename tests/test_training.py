"""Training: the data, the loss, resuming, and that a short run learns."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from dape_engine.errors import SettingsError
from dape_engine.loading import load_model
from dape_engine.model import DapeForCausalLM
from dape_training.config import TrainingConfig, load_training_config
from dape_training.data import (
    Corpus,
    read_documents,
    tokenize_documents,
    train_tokenizer,
    training_batches,
    validation_batches,
)
from dape_training.loss import linear_cross_entropy
from dape_training.trainer import learning_rate, parameter_groups, train
from models import TEXT

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    data = tmp_path / "text.jsonl.xz"
    with lzma.open(data, "wt", encoding="utf-8") as lines:
        for _ in range(20):
            lines.write(json.dumps({"text": TEXT[0] * 3}) + "\n")
    return TrainingConfig.model_validate(
        {
            "model": {
                "vocab_size": 300,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "train_length": 16,
                "max_model_len": 64,
                "position": {"kind": "kerple"},
                "dape": {"width": 8},
            },
            "train_data": data,
            "valid_data": data,
            "batch_size": 8,
            "steps": 40,
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-3,
            "warmup_steps": 4,
            "precision": "no",
            "validate_every": 20,
            "checkpoint_every": 20,
        }
    )


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_short_run_learns_and_leaves_a_model_folder(config: TrainingConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert curve[40] < curve[10] - 0.5
    model = load_model(tmp_path / "run" / "model", torch.float32, torch.device("cpu"))
    assert model.config == config.model
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "DAPE over kerple" in card
    assert (tmp_path / "run" / "model" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_equals_an_unbroken_one(config: TrainingConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "whole")
    # The schedule depends on the number of steps, so the break is made by a checkpoint half way.
    broken = tmp_path / "broken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dape_training.trainer.learning_rate", interrupt_at(20))
        with pytest.raises(KeyboardInterrupt):
            train(config, broken)
    train(config, broken)
    assert losses(broken)[40] == pytest.approx(losses(tmp_path / "whole")[40], abs=1e-4)


def test_segments_are_those_of_the_tokenizer(config: TrainingConfig, tmp_path: Path) -> None:
    """Training looks up the tokens that end a segment, and the model folder names them."""
    settings = config.model.with_position(kind="bipe")
    train(config.model_copy(update={"model": settings, "steps": 2}), tmp_path / "run")
    model = load_model(tmp_path / "run" / "model", torch.float32, torch.device("cpu"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json"))
    assert {0, tokenizer.token_to_id(".")} <= set(model.config.position.segment_tokens)
    assert tokenizer.token_to_id("a") not in model.config.position.segment_tokens


def test_two_processes_train_the_model_of_one(config: TrainingConfig, tmp_path: Path) -> None:
    """With parameters of every kind: a table that all layers share, one of all positions, of DAPE."""
    positions: dict[str, dict[str, Any]] = {
        "t5": {"position": {"kind": "t5"}, "dape": None},
        "learned": {"position": {"kind": "learned"}},
        "fire": {"position": {"kind": "fire"}, "dape": {"version": 2, "kernel": 3, "width": 8}},
        "bipe": {"position": {"kind": "bipe"}},
    }
    few = {**config.model_dump(mode="json"), "steps": 4, "warmup_steps": 1, "validate_every": 4}
    configs = {name: {**few, "model": {**few["model"], **layer}} for name, layer in positions.items()}
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    program = [Path(__file__).with_name("two_processes.py"), tmp_path / "configs.json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, settings in configs.items():
        alone = tmp_path / "alone" / name
        train(TrainingConfig.model_validate(settings), alone)
        ours, theirs = (
            json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
            for folder in (alone, tmp_path / name)
        )
        assert ours == pytest.approx(theirs, abs=1e-3), name


def interrupt_at(step: int):
    def rate(config: TrainingConfig, current: int) -> float:
        if current == step:
            raise KeyboardInterrupt
        return learning_rate(config, current)

    return rate


def test_the_rate_warms_up_and_falls_to_its_minimum(config: TrainingConfig) -> None:
    rates = [learning_rate(config, step) for step in range(41)]
    assert rates[0] == pytest.approx(1e-2 / 4)
    assert rates[3] == pytest.approx(1e-2)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[40] == pytest.approx(1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_batches_cover_an_epoch_once_and_resume_anywhere() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    first = list(islice(training_batches(tokens, 10, 4, seed=3), 24))
    starts = torch.cat(first)[:, 0]
    assert len(starts.unique()) == len(starts) == 96
    assert all(torch.equal(row, row[0] + torch.arange(11)) for batch in first for row in batch)
    later = list(islice(training_batches(tokens, 10, 4, seed=3, first_step=5), 19))
    assert all(torch.equal(a, b) for a, b in zip(first[5:], later, strict=True))
    other = next(training_batches(tokens, 10, 4, seed=3, first_step=24))
    assert not torch.equal(other, first[0])


def test_validation_windows_are_spread_over_the_text() -> None:
    batches = validation_batches(np.arange(1000, dtype=np.int32), 10, 4, 5)
    starts = torch.cat(batches)[:, 0]
    assert len(starts) == 20
    assert (int(starts.min()), int(starts.max())) == (0, 980)


def test_the_tokenizer_round_trips_any_text() -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    for text in (TEXT[0], "日本語 and 🙂", "\x00\t\n  spaces"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    tokens = tokenize_documents(["a", "b"], tokenizer)
    assert tokens.tolist()[1::2] == [0, 0]


def test_documents_are_read_from_plain_and_compressed_files(tmp_path: Path, config: TrainingConfig) -> None:
    (tmp_path / "plain.jsonl").write_text('{"text": "é"}\n{"text": "b"}\n')
    assert read_documents(tmp_path / "plain.jsonl") == ["é", "b"]
    assert len(read_documents(config.train_data)) == 20


def test_a_corpus_is_made_of_files_and_licences(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"text": "1", "license": "CC0"}\n{"text": "2", "license": "GPL"}\n')
    second.write_text('{"text": "3", "license": "CC0"}\n{"text": "4"}\n')
    assert Corpus.of([second, first, second]).documents() == ["3", "4", "1", "2", "3", "4"]
    free = Corpus.of([first, second], ["CC0"])
    assert free.documents() == ["1", "3"]
    assert len({free.key(), Corpus.of([first, second]).key(), Corpus.of(first).key()}) == 3
    with pytest.raises(ValueError, match="no document has 'MIT'"):
        Corpus.of(first, ["CC0", "MIT"]).documents()


def test_a_run_goes_on_from_the_weights_of_a_model_folder(config: TrainingConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "first")
    model = tmp_path / "first/model"
    further = config.model_copy(update={"initial_weights": model, "seed": 1, "warmup_steps": 20})
    train(further, tmp_path / "second")
    first, second = losses(tmp_path / "first"), losses(tmp_path / "second")
    assert second[10] < first[20]
    assert (tmp_path / "second/model/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert "from the weights of model" in (tmp_path / "second/model/README.md").read_text()
    wide = further.model_copy(update={"model": further.model.model_copy(update={"intermediate_size": 96})})
    with pytest.raises(SettingsError, match=r"initial_weights: .* has the shape \(64,\), expected \(96,\)"):
        train(wide, tmp_path / "third")


@pytest.mark.parametrize("count", [1, 511, 1030])
def test_the_chunked_loss_equals_cross_entropy(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (count,), generator=generator)
    actual = linear_cross_entropy(hidden, weight, targets) * 3
    expected = functional.cross_entropy(hidden @ weight.t(), targets) * 3
    assert torch.allclose(actual, expected, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(actual, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = load_training_config(path, {})
    assert config.warmup_steps < config.steps


@pytest.mark.parametrize(("kind", "scalars"), [("kerple", "bias_p"), ("t5", "position.weight")])
def test_weight_decay_spares_norms_and_biases_only(kind: str, scalars: str) -> None:
    """As in Megatron's rule, under which the published models were trained. Shared parameters come once."""
    shared = load_training_config(CONFIGS / "dape-kerple-8m.yaml", {}).model.with_position(kind=kind)
    model = DapeForCausalLM(shared.model_copy(update={"tie_word_embeddings": True}))
    groups: list[list[int]] = [list(map(id, group["params"])) for group in parameter_groups(model, 0.1)]  # type: ignore[call-overload]
    decayed, free = map(set, groups)
    assert len(groups[0]) + len(groups[1]) == len(decayed) + len(free)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert not decayed & free
    assert decayed | free == set(names)
    assert all("norm" in names[p] or names[p].endswith(".bias") for p in free)
    assert all(not names[p].endswith(".bias") for p in decayed)
    assert any(names[p].endswith(scalars) for p in decayed)
