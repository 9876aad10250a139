"""Hugging Face folders with random weights: imported, the engine's logits are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import nn

from dape_engine.convert.assemble import Report
from dape_engine.convert.hf import import_hf
from dape_engine.convert.result import ImportOptions
from dape_engine.errors import ModelFolderError
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config
from dape_server.cli import cli
from dape_training.data import train_tokenizer
from models import TEXT
from stepping import PIECES, make_runner, stepped_logits

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 304, "bos_token_id": 0, "eos_token_id": 0}
NEOX = {
    **SIZES,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
BLOOM = {**SIZES, "hidden_size": 48, "n_layer": 2}
MPT = {**SIZES, "d_model": 48, "n_layers": 2, "max_seq_len": 64}
GPT2 = {**SIZES, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64}
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def attn(**settings: Any) -> dict[str, Any]:
    return {"attn_config": {"attn_type": "multihead_attention", "alibi": True, **settings}}


# family, settings, and whether all layers can run in one call.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "pythia": ("GPTNeoX", {**NEOX, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}, False),
    "neox-sequential": (
        "GPTNeoX",
        {
            **NEOX,
            "use_parallel_residual": False,
            "hidden_act": "gelu_new",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
            "layer_norm_eps": 1e-3,
        },
        False,
    ),
    "bloom": ("Bloom", {**BLOOM, "n_head": 4}, True),
    "bloom-3-heads": ("Bloom", {**BLOOM, "n_head": 3, "layer_norm_epsilon": 1e-3}, True),
    "mpt": ("Mpt", {**MPT, "n_heads": 4, **attn()}, True),
    "mpt-3-heads": ("Mpt", {**MPT, "n_heads": 3, **attn(alibi_bias_max=16)}, True),
    "mpt-clipped": ("Mpt", {**MPT, "n_heads": 6, **attn(clip_qkv=1.5)}, False),
    "mpt-scaled": ("Mpt", {**MPT, "n_heads": 4, **attn(softmax_scale=0.7)}, True),
    "gpt2": ("GPT2", GPT2, True),
    "gpt2-inner": (
        "GPT2",
        {
            **GPT2,
            "n_inner": 80,
            "activation_function": "gelu",
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
        },
        True,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _alibi_bias_max() -> Any:
    """MPT's own code uses the setting, transformers' copy has it but computes with 8."""
    from transformers.models.mpt import modeling_mpt

    build = modeling_mpt.build_mpt_alibi_tensor

    def wanted(self: Any, heads: int, length: int, _: int = 8, device: Any = None) -> Any:
        return build(heads, length, self.config.attn_config.alibi_bias_max, device)

    patch = pytest.MonkeyPatch()
    patch.setattr(modeling_mpt.MptModel, "build_mpt_alibi_tensor", wanted)
    yield
    patch.undo()


def random_transformer(name: str) -> Any:
    family, settings, _ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write_source(folder: Path, model: nn.Module, *, pickled: bool = False) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    train_tokenizer(TEXT, 300).save(str(folder / "tokenizer.json"))
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def convert(source: Path, target: Path, **options: Any) -> Report:
    report = Report(str(source))
    import_hf(source, target, ImportOptions(**options), report)
    return report


def expected_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = random_transformer(name)
    source = write_source(tmp_path / "source", model)
    report = convert(source, tmp_path / "model")
    assert (report.count("missing"), report.count("unused")) == (0, 0)
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = expected_logits(model, ids)
    runner = make_runner(tmp_path / "model")
    if runner.backend.name == "cpu":
        assert (runner._decoder is not None) is MODELS[name][2]
    for sizes in PIECES.values():
        assert (stepped_logits(runner, ids, sizes) - wanted).abs().max() < 1e-4
    chunked = make_runner(tmp_path / "model", attention_backend="chunked")
    assert (stepped_logits(chunked, ids, PIECES["chunks"]) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["pythia", "bloom", "mpt", "gpt2"])
def test_pickled_weights_give_the_same_folder(name: str, tmp_path: Path) -> None:
    model = random_transformer(name)
    convert(write_source(tmp_path / "a", model), tmp_path / "from-safetensors")
    convert(write_source(tmp_path / "b", model, pickled=True), tmp_path / "from-pickle")
    first, second = (load_file(tmp_path / f"from-{x}/model.safetensors") for x in ("safetensors", "pickle"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_shards_are_joined(tmp_path: Path) -> None:
    model = random_transformer("gpt2")
    source = write_source(tmp_path / "source", model)
    model.save_pretrained(source, max_shard_size="50KB")
    (source / "model.safetensors").unlink(missing_ok=True)
    assert len(list(source.glob("*.safetensors"))) > 1
    assert convert(source, tmp_path / "model").count("missing") == 0


def test_files_of_older_versions(tmp_path: Path) -> None:
    """GPT-2's names without the inner model's, with masks among the weights; rotation as it was set once."""
    source = write_source(tmp_path / "gpt2", random_transformer("gpt2"))
    tensors = load_file(source / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, source / "model.safetensors")
    report = convert(source, tmp_path / "model")
    assert {entry.source for entry in report.entries if entry.status == "ignored"} == {
        "h.0.attn.bias",
        "lm_head.weight",
    }
    source = write_source(tmp_path / "neox", random_transformer("pythia"))
    edit(source, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=20000)
    convert(source, tmp_path / "old-neox")
    position = load_config(tmp_path / "old-neox").position
    assert (position.fraction, position.base) == (0.5, 20000)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings.update(changes)
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_tokens_and_limits_come_along(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_transformer("bloom"))
    edit(source, eos_token_id=[5, 7], seq_length=48)
    report = convert(source, tmp_path / "model", max_model_len=512, dtype="bfloat16")
    config = load_config(tmp_path / "model")
    assert (config.bos_token_id, config.eos_token_id) == (0, 5)
    assert (config.train_length, config.max_model_len, config.dtype) == (48, 512, "bfloat16")
    assert any("[5, 7]" in note for note in report.notes)
    assert TextTokenizer.load(tmp_path / "model", config).encode("It was")


def test_texts_end_with_the_tokenizers_own_end_where_none_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_transformer("mpt"))
    edit(source, eos_token_id=None)
    report = convert(source, tmp_path / "model")
    end = load_config(tmp_path / "model").eos_token_id
    assert end == train_tokenizer(TEXT, 300).token_to_id("<|endoftext|>")
    assert any("names no end token" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "llama"}, "model_type 'llama' is not supported"),
        ("gpt2", {"n_embd": 0}, "n_embd: Input should be greater than 0, got 0"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: .*got 'relu'"),
        (
            "gpt2",
            {"n_embd": 96},
            r"tensor wte.weight has shape \[304, 48\], the settings ask for \[304, 96\]",
        ),
        ("gpt2", {"n_layer": 3}, "lacks 12 tensor.*--allow-missing"),
        ("gpt2", {"n_layer": 1}, "holds the unknown 12 tensor.*--allow-unused"),
        ("pythia", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual.*got True"),
        ("mpt", attn(qk_ln=True), "attn_config.qk_ln"),
        ("mpt", attn(alibi=False), "attn_config.alibi"),
        ("mpt", attn(clip_qkv=1.0, softmax_scale=0.5), "cannot be combined with clip_qkv"),
        ("mpt", {"logit_scale": 2.0}, "logit_scale"),
        ("mpt", {"n_heads": 5}, "not a multiple of num_attention_heads 5"),
    ],
)
def test_what_is_not_supported_is_named(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source", random_transformer(name))
    edit(source, **changes)
    with pytest.raises(ModelFolderError, match=message):
        convert(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_missing_and_unused_tensors_can_be_allowed(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_transformer("gpt2"))
    tensors = load_file(source / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    tensors["transformer.extra"] = torch.zeros(3)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"lacks 1 tensor.*h\.1\.mlp\.c_fc\.bias"):
        convert(source, tmp_path / "model")
    with pytest.raises(ModelFolderError, match=r"holds the unknown 1 tensor.*: extra "):
        convert(source, tmp_path / "model", allow_missing=True)
    report = convert(source, tmp_path / "model", allow_missing=True, allow_unused=True)
    assert (report.count("missing"), report.count("unused")) == (1, 1)
    written = load_file(tmp_path / "model/model.safetensors")
    assert not written["layers.1.mlp.linear1.bias"].any()


def untie(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(304, 48)}, source / "model.safetensors")


def damage_weights(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_index(source: Path) -> None:
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')


def replace(name: str, tensor: torch.Tensor) -> Callable[[Path], Any]:
    def damage(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        save_file({**tensors, f"transformer.{name}": tensor}, source / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            replace("h.0.attn.c_attn.weight", torch.ones(48, 50)),
            r"c_attn\.weight has shape \[48, 50\], which does",
        ),
        (
            replace("h.0.mlp.c_fc.weight", torch.ones(2, 2, 2)),
            r"c_fc\.weight has shape \[2, 2, 2\], which does",
        ),
        (
            replace("h.1.mlp.c_fc.bias", torch.ones(192).to(torch.int8)),
            r"bias is torch\.int8, expected a float",
        ),
        (replace("wte.weight", torch.tensor(1.0)), r"wte\.weight has shape \[\]"),
        (untie, "lm_head.weight differs from wte.weight"),
        (damage_weights, "is damaged"),
        (damage_index, "not in the folder"),
        (lambda s: (s / "config.json").unlink(), "cannot read .*config.json"),
        (lambda s: (s / "config.json").write_text("{"), "not valid JSON"),
        (lambda s: (s / "config.json").write_text("[]"), "must hold settings"),
        (lambda s: (s / "model.safetensors").unlink(), "holds neither"),
        (lambda s: (s / "tokenizer.json").unlink(), "no tokenizer in .*--tokenizer"),
        (lambda s: (s / "tokenizer.json").write_text("{}"), "cannot read the tokenizer"),
    ],
)
def test_bad_folders_are_one_line_and_exit_code_2(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source", random_transformer("gpt2"))
    damage(source)
    with pytest.raises(ModelFolderError, match=message) as caught:
        convert(source, tmp_path / "model")
    assert "\n" not in caught.value.message


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_the_command_prints_and_writes_the_report(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_transformer("mpt"))
    result = run("--from", "hf", source, tmp_path / "model", "--report", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "blocks.1.attn.Wqkv.weight" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["counts"] == {"used": 14, "filled": 15, "ignored": 0, "unused": 0, "missing": 0}
    assert f"{report['counts']['used']} used" in result.output
    assert {entry["target"] for entry in report["tensors"]} >= {"norm.bias", "word_embeddings.weight"}
    again = run("--from", "hf", source, tmp_path / "model")
    assert again.exit_code == 1
    assert "exists already" in str(again.exception)
    assert "either --from" in str(run(source, tmp_path / "new").exception)
    assert "takes no other options" in str(run("--to", "hf", "--dtype", "float32", "a", "b").exception)
