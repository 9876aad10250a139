"""Layers made by the official modules, written as checkpoints and imported, give the official scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dape_engine.convert.assemble import Report
from dape_engine.convert.neox import import_gpt_neox
from dape_engine.convert.result import ImportOptions
from dape_engine.encoding import Rotary
from dape_engine.loading import load_model
from dape_kernels.attention import paged_attention, select_backend
from dape_kernels.reference import reference_scores
from golden import Golden
from layers import page, relative_error
from neox_checkpoints import make_model, neox_state, write_checkpoint

POS_EMB = {
    ("nope", "v1"): "nope_c",
    ("nope", "v2"): "nope_c_ffn",
    ("rope", "none"): "rotary",
    ("rope", "v1"): "rope_dapev1",
    ("rope", "v2"): "rope_dapev2",
    ("t5rpe", "none"): "rpe",
    ("nope", "none"): "none",
    **{(kind, "none"): kind for kind in ("alibi", "kerple", "fire", "cope")},
    **{(kind, "v1"): f"{kind}_c" for kind in ("alibi", "kerple", "fire")},
    **{(kind, "v2"): f"{kind}_dapev2" for kind in ("alibi", "kerple", "fire")},
}


def write(golden: Golden, folder: Path) -> Path:
    """A checkpoint of two layers with the golden layer's positional parameters in both."""
    about, tensors = golden.about, golden.tensors
    hidden = about["heads"] * about["head_dim"]
    sizes = {"hidden_size": hidden, "num_attention_heads": about["heads"]}
    model = make_model(**sizes, intermediate_size=64, position={"kind": "nope"})
    state = neox_state(model, "")
    official = {
        key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")
    }
    for index in (2, 3):
        state[index].update({f"{about['state_prefix']}.{key}": tensor for key, tensor in official.items()})
    settings: dict[str, Any] = {"pos-emb": POS_EMB[about["pos"], about["dape"]], "hidden-size": hidden}
    settings["num-attention-heads"] = about["heads"]
    if about["pos"] == "rope":
        settings |= {"rotary_pct": about["rope_pct"], "rotary-emb-base": about["rope_base"]}
    if about["dape"] == "v2":
        settings |= {"dapev2_kernel": about["kernel"], "mlp_width": about["hidden"]}
    return write_checkpoint(folder, state, **settings)


def rotated(golden: Golden, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, H, S, d] as the imported model's attention gets them."""
    query, key, value = (golden.tensors[name] for name in "qkv")
    if rotary is not None:
        turned = rotary(query.transpose(1, 2), key.transpose(1, 2), torch.arange(query.shape[2]))
        query, key = (x.transpose(1, 2) for x in turned)
    return query, key, value


def test_golden_layer_through_a_checkpoint(golden: Golden, tmp_path: Path) -> None:
    report = Report("golden")
    import_gpt_neox(write(golden, tmp_path / "source"), tmp_path / "model", ImportOptions(), report)
    assert (report.count("missing"), report.count("unused")) == (0, 0)
    model = load_model(tmp_path / "model", torch.float32, torch.device("cpu"))
    query, key, value = rotated(golden, model.rotary)
    sequences = list(zip(query.split(1), key.split(1), value.split(1), strict=True))
    end = query.shape[2] - golden.reach  # imported models go on past the last key, the files end there
    rows = golden.tensors["score_rows"]
    seen = (rows[:, None] >= torch.arange(query.shape[2])) & (rows[:, None] < end)
    for position in model.encodings:
        encoding = position.encoding()
        scores = reference_scores(query, key, encoding)[:, :, rows]
        assert relative_error(scores[..., seen], golden.tensors["scores"][..., seen]) < 2e-5
        backend = select_backend("auto", encoding, torch.float32, torch.device("cpu"), 16)
        paged = page(backend, sequences, 16, seed=0)
        output, _ = paged_attention(
            paged.query, paged.cache, paged.batch, encoding, backend=backend, workspace=1 << 20
        )
        output = output.view(len(query), query.shape[2], *output.shape[1:]).transpose(1, 2)
        assert relative_error(output[:, :, :end], golden.tensors["out"][:, :, :end]) < 2e-5
