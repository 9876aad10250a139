"""Model folders: what is written is read back, and damage is told in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dape_engine.config import ModelConfig
from dape_engine.errors import ModelFolderError
from dape_engine.loading import load_model
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config, resolve_model
from models import write_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "settings",
    [
        {"position": {"kind": "t5"}, "dape": {"width": 8}},
        {"position": {"kind": "fire"}, "dape": {"version": 2, "width": 8, "kernel": 3}},
        {"position": {"kind": "alibi"}, "tie_word_embeddings": True},
    ],
)
def test_a_model_is_read_back_as_it_was_written(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path, **settings)
    model = load_model(folder, torch.float32, CPU)
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    if settings["position"]["kind"] == "t5":
        assert model.encodings[0].weight is not None
        assert torch.equal(model.encodings[0].weight, model.encodings[1].weight)
        assert "layers.1.attention.position.weight" not in stored
    if settings.get("tie_word_embeddings"):
        assert torch.equal(model.final_linear.weight, model.word_embeddings.weight)


def test_other_programs_are_told_of_the_tokenizers_special_tokens(folder: Path) -> None:
    description = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer, config = TextTokenizer.load(folder, load_config(folder)), load_config(folder)
    assert tokenizer.encode(description["bos_token"]) == [config.bos_token_id]
    assert tokenizer.encode(description["eos_token"]) == [config.eos_token_id]
    assert description["model_max_length"] == config.max_model_len


def test_positional_parameters_stay_float32_in_a_half_precision_model(folder: Path) -> None:
    model = load_model(folder, torch.bfloat16, CPU)
    assert model.word_embeddings.weight.dtype == torch.bfloat16
    assert {p.dtype for encoding in model.encodings for p in encoding.parameters()} == {torch.float32}


def test_sharded_weights_are_read(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    state = load_model(folder, torch.float32, CPU).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def cut_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def leave_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "cannot read .*config.json: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda f: edit_config(f, hidden_size=-1), "hidden_size: .*greater than 0"),
        (lambda f: edit_config(f, num_attention_heads=5), "not a multiple of num_attention_heads 5"),
        (lambda f: edit_config(f, position={"kind": "magic"}), "position.kind"),
        (lambda f: edit_config(f, dape={"width": 8, "colour": 1}), "dape.colour"),
        (lambda f: edit_config(f, dape={"width": 8, "form": "x"}), "unknown form 'x'"),
        (lambda f: edit_config(f, dape={"version": 2, "kernel": 2}), "kernel must be odd, got 2"),
        (lambda f: edit_config(f, eos_token_id=304), "eos_token_id 304 is not below vocab_size 304"),
        (lambda f: edit_config(f, intermediate_size=32), "has shape"),
        (lambda f: edit_config(f, dape=None), "unknown .* tensor"),
        (drop_a_tensor, "lacks 1 tensor.*norm.weight"),
        (cut_the_weights, "is damaged"),
        (pickle_only, "only safetensors"),
        (leave_the_folder, "not in the folder"),
    ],
)
def test_damage_is_told_in_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelFolderError, match=message) as caught:
        load_model(folder, torch.float32, CPU)
    assert "\n" not in caught.value.message


def test_a_missing_or_too_large_tokenizer_is_told(folder: Path) -> None:
    config = load_config(folder)
    small = config.model_copy(update={"vocab_size": 100})
    with pytest.raises(ModelFolderError, match="vocab_size 100"):
        TextTokenizer.load(folder, small)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="cannot read"):
        TextTokenizer.load(folder, config)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFolderError, match=r"holds no tokenizer\.json"):
        TextTokenizer.load(folder, config)


def test_an_unknown_model_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="dape-kerple-8m"):
        resolve_model("gpt-5")
    with pytest.raises(ModelFolderError):
        resolve_model(str(tmp_path / "nothing"))
    shutil.rmtree(tmp_path)


def test_the_shipped_models_differ_in_dape_only() -> None:
    dape, plain = (load_config(resolve_model(name)) for name in ("dape-kerple-8m", "kerple-8m"))
    assert dape.dape is not None
    assert dape.dape.width == 32
    assert ModelConfig.model_validate({**dape.model_dump(), "dape": None}) == plain
