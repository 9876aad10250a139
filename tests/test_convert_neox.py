"""GPT-NeoX checkpoints of every encoding and layout: imported, they are the models they were written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dape_engine.convert.assemble import Report
from dape_engine.convert.neox import import_gpt_neox
from dape_engine.convert.result import ImportOptions
from dape_engine.errors import ModelFolderError
from dape_engine.loading import load_model
from dape_engine.model import DapeForCausalLM
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config
from dape_server.cli import cli
from neox_checkpoints import make_model, neox_state, write_checkpoint
from stepping import PIECES, make_runner, stepped_logits

V1 = {"width": 5}
V2 = {"version": 2, "width": 5, "kernel": 3}
FIRE = {"kind": "fire", "mlp_width": 7}
# pos_emb, name of the module, the model's settings.
ENCODINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "none": ("none", "", {"position": {"kind": "nope"}}),
    "nope_c": ("nope_c", "nope_c", {"position": {"kind": "nope"}, "dape": V1}),
    "nope_c_ffn": ("nope_c_ffn", "nope_c_ffn", {"position": {"kind": "nope"}, "dape": V2}),
    "alibi": ("alibi", "alibi_embed", {"position": {"kind": "alibi"}}),
    "alibi_c": ("alibi_c", "alibi_c_embed", {"position": {"kind": "alibi"}, "dape": V1}),
    "alibi_dapev2": ("alibi_dapev2", "alibi_dapev2", {"position": {"kind": "alibi"}, "dape": V2}),
    "alibi_capev2": ("alibi_capev2", "alibi_capev2", {"position": {"kind": "alibi"}, "dape": V2}),
    "kerple": ("kerple", "kerple", {"position": {"kind": "kerple"}}),
    "kerple_c": ("kerple_c", "kerple_c", {"position": {"kind": "kerple"}, "dape": V1}),
    "kerple_dapev2": ("kerple_dapev2", "kerple_dapev2", {"position": {"kind": "kerple"}, "dape": V2}),
    "kerple_capev2": ("capev2", "capev2", {"position": {"kind": "kerple"}, "dape": {**V2, "kernel": 5}}),
    "fire": ("fire", "fire", {"position": FIRE}),
    "fire_c": ("fire_c", "fire_c", {"position": FIRE, "dape": V1}),
    "fire_dapev2": ("fire_dapev2", "fire_dapev2", {"position": FIRE, "dape": V2}),
    "fire_capev2": ("capev2", "fire_capev2", {"position": FIRE, "dape": {**V2, "kernel": 1}}),
    "rotary": ("rotary", "", {"position": {"kind": "rope", "base": 500.0, "fraction": 0.5}}),
    "rope_dapev1": ("rope_dapev1", "dapev1", {"position": {"kind": "rope"}, "dape": V1}),
    "rope_dapev2": ("rope_dapev2", "dapev2", {"position": {"kind": "rope"}, "dape": V2}),
    "rope_capev2": ("rope_capev2", "capev2", {"position": {"kind": "rope"}, "dape": V2}),
    "rpe": ("rpe", "rpe", {"position": {"kind": "t5"}}),
    "cope": ("cope", "cope", {"position": {"kind": "cope", "max_positions": 6}}),
    "learned": ("learned", "", {"position": {"kind": "learned", "max_positions": 64}}),
    "sinusoidal": ("sinusoidal", "", {"position": {"kind": "sinusoidal"}}),
}
IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(2)).tolist()


def convert(source: Path, target: Path, **options: Any) -> Report:
    report = Report(str(source))
    import_gpt_neox(source, target, ImportOptions(**options), report)
    return report


def write(folder: Path, name: str, *, ranks: int = 1, single: bool = False, **more: Any) -> DapeForCausalLM:
    """Write the checkpoint of a random model with one of the encodings and return the model."""
    pos_emb, module, settings = ENCODINGS[name]
    yaml = {key: more.pop(key) for key in list(more) if key not in ("parallel_residual", "hidden_act")}
    model = make_model(**settings, **more)
    position = settings["position"]
    if position["kind"] == "rope":
        yaml |= {"rotary_pct": position.get("fraction", 1.0), "rotary-emb-base": position.get("base", 10000)}
    write_checkpoint(folder, neox_state(model, module), ranks, single=single, **{"pos-emb": pos_emb, **yaml})
    return model


def same_weights(model: DapeForCausalLM, folder: Path) -> None:
    """The folder's tensors are the model's, clamped where they are clamped at every use."""
    found = load_model(folder, torch.float32, torch.device("cpu")).state_dict()
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        tensor = tensor.clamp_min(0.01) if key.endswith(("bias_p", "bias_a")) else tensor
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding(name: str, tmp_path: Path) -> None:
    model = write(tmp_path / "source", name)
    report = convert(tmp_path / "source", tmp_path / "model")
    assert (report.count("missing"), report.count("unused")) == (0, 0)
    same_weights(model, tmp_path / "model")
    config, wanted = load_config(tmp_path / "model"), model.config
    assert config.dape == wanted.dape
    kept = ("kind", "base", "fraction", "max_positions", "mlp_width")
    assert [getattr(config.position, x) for x in kept] == [getattr(wanted.position, x) for x in kept]
    assert (config.train_length, config.max_model_len, config.vocab_size) == (32, 64, 304)


@pytest.mark.parametrize("name", ["kerple_dapev2", "fire_c", "rotary", "rpe", "alibi_c"])
def test_imported_models_answer_alike_in_any_pieces(name: str, tmp_path: Path) -> None:
    write(tmp_path / "source", name)
    convert(tmp_path / "source", tmp_path / "model")
    runner = make_runner(tmp_path / "model")
    whole = stepped_logits(runner, IDS, PIECES["one prefill"])
    for sizes in PIECES.values():
        assert (stepped_logits(runner, IDS, sizes) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("single", [False, True], ids=["layer files", "one file"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["alibi", "kerple", "rpe", "rotary", "learned"])
def test_ranks_are_joined(name: str, ranks: int, single: bool, tmp_path: Path) -> None:
    model = write(tmp_path / "source", name, ranks=ranks, single=single)
    report = convert(tmp_path / "source", tmp_path / "model")
    assert (report.count("missing"), report.count("unused")) == (0, 0)
    same_weights(model, tmp_path / "model")


def test_with_parallel_residuals_biases_are_summed(tmp_path: Path) -> None:
    model = write(tmp_path / "source", "rotary", ranks=2, parallel_residual=True, gpt_j_residual=True)
    folder = tmp_path / "source/global_step10"
    for layer in (2, 3):
        path = folder / f"layer_{layer:02}-model_01-model_states.pt"
        part = torch.load(path)
        for key in ("attention.dense.bias", "mlp.linear2.bias"):
            part[key] += 1
        torch.save(part, path)
    convert(tmp_path / "source", tmp_path / "model")
    found = load_model(tmp_path / "model", torch.float32, torch.device("cpu"))
    assert load_config(tmp_path / "model").parallel_residual
    for new, old in zip(found.layers, model.layers, strict=True):
        assert torch.allclose(new.attention.dense.bias, 2 * old.attention.dense.bias + 1, atol=1e-6)
        assert torch.allclose(new.mlp.linear2.bias, 2 * old.mlp.linear2.bias + 1, atol=1e-6)


@pytest.mark.parametrize("key", ["attention.dense.bias", "input_layernorm.weight", "mlp.linear2.bias"])
def test_replicas_that_differ_are_named(key: str, tmp_path: Path) -> None:
    write(tmp_path / "source", "rotary", ranks=2)
    path = tmp_path / "source/global_step10/layer_03-model_01-model_states.pt"
    part = torch.load(path)
    part[key][3] += 1e-3
    torch.save(part, path)
    with pytest.raises(ModelFolderError, match=rf"sequential\.3\.{key} is a replica and differs"):
        convert(tmp_path / "source", tmp_path / "model")


@pytest.mark.parametrize("name", ["kerple_c", "fire_dapev2", "nope_c"])
def test_networks_of_all_heads_are_replicas(name: str, tmp_path: Path) -> None:
    model = write(tmp_path / "source", name, ranks=2)
    convert(tmp_path / "source", tmp_path / "model")
    same_weights(model, tmp_path / "model")
    for rank in (0, 1):  # a network for each rank's own heads is another model
        path = tmp_path / f"source/global_step10/layer_02-model_{rank:02}-model_states.pt"
        part = torch.load(path)
        key = next(key for key in part if key.endswith("mlp2.0.weight"))
        part[key] = part[key][:, : part[key].shape[1] // 2].clone()
        torch.save(part, path)
    with pytest.raises(ModelFolderError, match=r"mlp2\.0\.weight has shape .* with 4 heads feeds"):
        convert(tmp_path / "source", tmp_path / "other")


def rewrite(folder: Path, index: int, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / f"global_step10/layer_{index:02}-model_00-model_states.pt"
    part = torch.load(path)
    change(part)
    torch.save(part, path)


def test_half_precision_checkpoints(tmp_path: Path) -> None:
    """Parameters are clamped in the dtype that training clamped them in; the threshold stays whole."""
    kerple, fire = make_model(**ENCODINGS["kerple_c"][2]).half(), make_model(**ENCODINGS["fire_c"][2]).half()
    kerple.encodings[0].bias_a.fill_(-1)
    fire.encodings[0].init_L.fill_(256)
    write_checkpoint(tmp_path / "a", neox_state(kerple, "kerple_c"), **{"pos-emb": "kerple_c"})
    write_checkpoint(tmp_path / "b", neox_state(fire, "fire_c"), **{"pos-emb": "fire_c"})
    convert(tmp_path / "a", tmp_path / "kerple")
    convert(tmp_path / "b", tmp_path / "fire", dtype="float32")
    found = load_model(tmp_path / "kerple", torch.float32, torch.device("cpu"))
    assert load_config(tmp_path / "kerple").dtype == "float16"
    assert found.encodings[0].bias_a.unique().tolist() == [float(torch.tensor(0.01).half())]
    found = load_model(tmp_path / "fire", torch.float32, torch.device("cpu"))
    assert load_config(tmp_path / "fire").dtype == "float32"
    assert (found.encodings[0].init_L.dtype, int(found.encodings[0].init_L)) == (torch.int64, 256)


def test_older_names_tied_weights_and_other_settings(tmp_path: Path) -> None:
    model = make_model(position={"kind": "nope"}, hidden_act="gelu_tanh", tie_word_embeddings=True)
    state = neox_state(model, "")
    del state[6]
    for index in (2, 3):
        for old, new in (("linear1", "dense_h_to_4h"), ("linear2", "dense_4h_to_h")):
            for kind in ("weight", "bias"):
                state[index][f"mlp.{new}.{kind}"] = state[index].pop(f"mlp.{old}.{kind}")
        state[index]["attention.rotary_emb.inv_freq"] = torch.ones(4)
    settings = {
        "pos-emb": "none",
        "no-weight-tying": False,
        "bias-gelu-fusion": True,
        "layernorm-epsilon": 1e-3,
    }
    write_checkpoint(tmp_path / "source", state, 1, **settings)
    report = convert(tmp_path / "source", tmp_path / "model")
    same_weights(model, tmp_path / "model")
    config = load_config(tmp_path / "model")
    assert (config.tie_word_embeddings, config.hidden_act, config.layer_norm_eps) == (True, "gelu_tanh", 1e-3)
    assert report.count("ignored") == 2


def test_tied_norms_and_absent_biases(tmp_path: Path) -> None:
    model = make_model(position={"kind": "nope"}, parallel_residual=True)
    state = neox_state(model, "")
    for index in (2, 3):
        for name in ("attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2"):
            del state[index][f"{name}.bias"]
    settings = {"gpt_j_residual": True, "gpt_j_tied": True, "pos-emb": "none"}
    settings |= {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
    write_checkpoint(tmp_path / "source", state, 1, **settings)
    report = convert(tmp_path / "source", tmp_path / "model")
    layer = load_model(tmp_path / "model", torch.float32, torch.device("cpu")).layers[1]
    assert torch.equal(layer.post_attention_layernorm.weight, model.layers[1].input_layernorm.weight)
    assert not layer.mlp.linear1.bias.any()
    assert (report.count("filled"), report.count("ignored")) == (8, 4)


def test_slopes_come_from_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "a", "alibi")
    rewrite(tmp_path / "a", 2, lambda part: part["attention.alibi_embed.slopes"].fill_(0.125))
    convert(tmp_path / "a", tmp_path / "model")
    first, second = load_model(tmp_path / "model", torch.float32, torch.device("cpu")).encodings
    assert first.slopes.tolist() == [0.125] * 4
    assert second.slopes.tolist() == [0.25, 0.0625, 0.015625, 0.00390625]


def remove(name: str) -> Callable[[Path], Any]:
    return lambda source: (source / "global_step10" / name).unlink()


def yaml(**changes: Any) -> Callable[[Path], Any]:
    def change(source: Path) -> None:
        path = source / "global_step10/configs/model.yml"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(index: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda source: rewrite(source, index, change)


def cut(source: Path) -> None:
    path = source / "global_step10/layer_02-model_00-model_states.pt"
    path.write_bytes(path.read_bytes()[:300])


def second_settings(source: Path) -> None:
    (source / "global_step10/configs/other.yml").write_text("hidden_size: 64")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("layer_03-model_00-model_states.pt"), "num_layers is 2, the checkpoint has 1 layers"),
        (remove("layer_05-model_00-model_states.pt"), r"lacks 2 tensor.*sequential\.5\.norm\.weight"),
        (
            remove("layer_00-model_00-model_states.pt"),
            r"lacks the tensor sequential\.0\.word_embeddings\.weight",
        ),
        (remove("configs/model.yml"), "no training settings.*--settings"),
        (second_settings, "hidden_size is 64, and 32 elsewhere"),
        (cut, "is damaged, or older than PyTorch 1.6"),
        (yaml(**{"num-layers": None}), "num_layers: Input should be a valid integer, got None"),
        (yaml(**{"model-parallel-size": 2}), "model_parallel_size is 2, .* holds the files of 1 rank"),
        (yaml(**{"pos-emb": "alibi"}), "pos_emb is 'alibi', the tensors .*are those of kerple"),
        (yaml(**{"pos-emb": "kerple"}), "pos_emb is 'kerple', the tensors are those of DAPE version 1"),
        (yaml(**{"pos-emb": "xl_bias"}), "pos_emb 'xl_bias' is not supported"),
        (yaml(mlp_width=8), "mlp_width is 8, the tensors have 5"),
        (yaml(norm="rmsnorm"), "norm: .*got 'rmsnorm'"),
        (yaml(activation="swiglu"), "activation: .*got 'swiglu'"),
        (yaml(apply_query_key_layer_scaling=True), "apply_query_key_layer_scaling: .*got True"),
        (yaml(num_kv_heads=2), "num_kv_heads: 2 key heads for 4"),
        (yaml(attention_config=[[["global", "local"], "all"]]), "attention_config.*'local'"),
        (yaml(**{"hidden-size": 48}), r"has shape \[304, 32\], the settings ask for \[304, 48\]"),
        (yaml(**{"num-attention-heads": 8}), "mlp2.0.weight has shape .*with 8 heads feeds 16 channels"),
        (
            tensors(2, lambda p: p.pop("mlp.linear1.bias")),
            r"lacks 1 tensor.*sequential\.2\.mlp\.linear1\.bias",
        ),
        (tensors(2, lambda p: p.update(extra=torch.ones(2))), r"unknown 1 tensor.*sequential\.2\.extra"),
        (tensors(0, lambda p: p.update({"word_embeddings.weight": torch.tensor(1.0)})), r"has shape \[\]"),
        (
            tensors(3, lambda p: p.update({"mlp.linear1.weight": torch.tensor(1.0)})),
            r"has shape \[\], the set",
        ),
        (lambda s: (s / "tokenizer.json").unlink(), "no tokenizer in .*--tokenizer"),
        (lambda s: (s / "latest").write_text(".."), "names the folder '..', which is not there"),
        (lambda s: [path.unlink() for path in s.glob("*/*.pt")], "holds neither layer_00"),
        (lambda s: (s / "latest").write_text("../x"), "names the folder '../x', which is not there"),
    ],
)
def test_bad_checkpoints_are_one_line(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source, "kerple_c")
    damage(source)
    with pytest.raises(ModelFolderError, match=message) as caught:
        convert(source, tmp_path / "model")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "model").exists()


def test_kernels_that_disagree_with_their_setting_are_refused(tmp_path: Path) -> None:
    for name in ("capev2_kernel", "dapev2_kernel"):
        write(tmp_path / name, "kerple_capev2", **{name: 3})
        with pytest.raises(ModelFolderError, match="is 3, the tensors have 5"):
            convert(tmp_path / name, tmp_path / "model")
    write(tmp_path / "good", "kerple_capev2", capev2_kernel=5)
    convert(tmp_path / "good", tmp_path / "model")


def test_a_lost_rank_is_named(tmp_path: Path) -> None:
    write(tmp_path / "source", "rotary", ranks=4)
    remove("layer_03-model_02-model_states.pt")(tmp_path / "source")
    with pytest.raises(ModelFolderError, match=r"lacks layer_03-model_02-model_states\.pt"):
        convert(tmp_path / "source", tmp_path / "model")


def test_the_table_of_t5_is_one(tmp_path: Path) -> None:
    write(tmp_path / "source", "rpe")
    rewrite(tmp_path / "source", 3, lambda part: part["attention.rpe.weight"].mul_(2))
    with pytest.raises(ModelFolderError, match=r"sequential\.3\.attention\.rpe\.weight differs"):
        convert(tmp_path / "source", tmp_path / "model")
    rewrite(tmp_path / "source", 3, lambda part: part.pop("attention.rpe.weight"))
    assert convert(tmp_path / "source", tmp_path / "model").count("missing") == 0


def test_padded_vocabularies_are_told(tmp_path: Path) -> None:
    write(tmp_path / "source", "none", make_vocab_size_divisible_by=128)
    known = len(json.loads((tmp_path / "source/tokenizer.json").read_text())["model"]["vocab"])
    notes = convert(tmp_path / "source", tmp_path / "model").notes
    assert f"{304 - known} embeddings are padding: no token has their ids" in notes
    assert any("no multiple of make_vocab_size_divisible_by x ranks = 128" in note for note in notes)
    small = tmp_path / "small"
    state = neox_state(make_model(position={"kind": "nope"}, vocab_size=known - 1), "")
    write_checkpoint(small, state, **{"pos-emb": "none"})
    with pytest.raises(ModelFolderError, match=f"the tokenizer has {known} ids, the checkpoint {known - 1}"):
        convert(small, tmp_path / "small-model")


def test_tokenizers_of_both_kinds(tmp_path: Path) -> None:
    """GPT-2's vocabulary and merges give the same ids as the whole file; NeoX's file is found by its name."""
    write(tmp_path / "a", "none", vocab_file="/data/gpt2-vocab.json", merge_file="/data/gpt2-merges.txt")
    whole = json.loads((tmp_path / "a/tokenizer.json").read_text())
    bpe = whole["model"]
    (tmp_path / "a/gpt2-vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
    (tmp_path / "a/gpt2-merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "a/tokenizer.json").rename(tmp_path / "a/20B_tokenizer.json")
    convert(tmp_path / "a", tmp_path / "pair")
    (tmp_path / "a/gpt2-vocab.json").unlink()
    convert(tmp_path / "a", tmp_path / "whole")
    config = load_config(tmp_path / "pair")
    first, second = (TextTokenizer.load(tmp_path / name, config) for name in ("pair", "whole"))
    text = "It was the best of times — “naïve” 🙂.\n  <|endoftext|>"
    assert first.encode(text) == second.encode(text)
    assert first.decode(first.encode(text), skip_special_tokens=False) == text
    end = bpe["vocab"].get("<|endoftext|>")
    assert (config.bos_token_id, config.eos_token_id) == (end, end)


def test_settings_and_tokenizer_can_be_given(tmp_path: Path) -> None:
    model = write(tmp_path / "source", "kerple_c")
    folder = tmp_path / "source/global_step10"
    (folder / "configs/model.yml").rename(tmp_path / "mine.yml")
    (tmp_path / "source/tokenizer.json").rename(tmp_path / "mine.json")
    arguments = ["--settings", tmp_path / "mine.yml", "--tokenizer", tmp_path / "mine.json"]
    command = [
        "convert",
        "--from",
        "gpt-neox",
        *arguments,
        folder,
        tmp_path / "model",
        "--max-model-len",
        128,
    ]
    result = CliRunner().invoke(cli, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert "sequential.2.attention.kerple_c.bias_a" in result.output
    same_weights(model, tmp_path / "model")
    assert load_config(tmp_path / "model").max_model_len == 128
