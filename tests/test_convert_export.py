"""Model folders written for transformers: loaded without dape_*, they give the engine's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dape_engine.convert.export import export_hf
from dape_engine.errors import ModelFolderError
from dape_engine.weights import load_config
from dape_kernels.encoding import FORMS
from layers import COPE, NOPE, V1, V2, WITH_BIAS
from models import plain_logprobs, write_model
from stepping import PIECES, make_runner, stepped_logits

transformers = pytest.importorskip("transformers")

ROPE = {"kind": "rope", "base": 500.0, "fraction": 0.5}
OFFICIAL = {"version": 2, "width": 5, "kernel": 3, "right_edge": "official"}
MODELS: dict[str, dict[str, Any]] = {
    "nope": {"position": {"kind": "nope"}},
    "cope": {"position": COPE.model_dump(exclude_unset=True)},
    "rope": {"position": ROPE, "parallel_residual": True},
    "rope-v1": {"position": ROPE, "dape": {"width": 7}},
    "rope-v2": {"position": ROPE, "dape": V2["v2-k3"].model_dump()},
    "learned": {"position": {"kind": "learned", "max_positions": 512}, "hidden_act": "gelu_tanh"},
    "sinusoidal-v1": {"position": {"kind": "sinusoidal"}, "dape": {"width": 7}},
    "tied": {"position": {"kind": "alibi"}, "tie_word_embeddings": True, "embedding_norm": True},
    "clipped": {"position": {"kind": "alibi"}, "clip_qkv": 0.7},
    **{kind: {"position": position.model_dump(exclude_unset=True)} for kind, position in WITH_BIAS.items()},
    **{
        f"{kind}-{name}": {"position": position.model_dump(exclude_unset=True), "dape": dape.model_dump()}
        for kind, position in {"nope": NOPE, **WITH_BIAS}.items()
        for name, dape in {"v1": V1, "v2-k3": V2["v2-k3"]}.items()
    },
    "fire-v2-k5": {"position": WITH_BIAS["fire"].model_dump(), "dape": V2["v2-k5"].model_dump()},
    **{
        f"kerple-{form}": {"position": {"kind": "kerple"}, "dape": {"width": 7, "form": form}}
        for form in sorted(FORMS.keys() - {"score_only"})
    },
}
IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies modeling files to a cache, from which it imports them."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    before = set(sys.modules)
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()


def export(tmp_path: Path, **settings: Any) -> Path:
    export_hf(write_model(tmp_path / "model", **settings), tmp_path / "exported")
    return tmp_path / "exported"


@torch.inference_mode()
def cached_logits(model: Any, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits [B, tokens, V], read in pieces with a cache."""
    start, cache, found = 0, None, []
    for size in sizes:
        end = start + size
        seen = None if mask is None else mask[:, :end]
        output = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
        start = end
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_engines(name: str, tmp_path: Path) -> None:
    folder = export(tmp_path, **MODELS[name])
    model, runner = load(folder), make_runner(tmp_path / "model")
    wanted = stepped_logits(runner, IDS.tolist(), PIECES["chunks"])
    for sizes in PIECES.values():
        assert (cached_logits(model, IDS[None], sizes)[0] - wanted).abs().max() < 1e-4


def test_the_official_right_edge(tmp_path: Path) -> None:
    """It depends on where a call ends, so only whole texts can be compared."""
    folder = export(tmp_path, position={"kind": "kerple"}, dape=OFFICIAL)
    with torch.inference_mode():
        found = load(folder)(IDS[None]).logits[0].log_softmax(-1)
    assert (found - plain_logprobs(tmp_path / "model", IDS.tolist())).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["kerple-v2-k3", "fire-v1", "t5-v1", "rope-v2", "learned", "cope"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str, tmp_path: Path) -> None:
    model = load(export(tmp_path, **MODELS[name]))
    lengths = (40, 25)
    batch, mask = torch.full((2, 40), 299), torch.zeros(2, 40, dtype=torch.int64)
    for row, length in enumerate(lengths):
        place = slice(40 - length, 40) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = IDS[:length], 1
    for sizes in (PIECES["one prefill"], PIECES["chunks"]):
        found = cached_logits(model, batch, sizes, mask)
        for row, length in enumerate(lengths):
            alone = cached_logits(model, IDS[None, :length], [length])[0]
            assert (found[row][mask[row].bool()] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["kerple-v1", "kerple-v2-k3", "fire-v2-k5", "rope-v1", "t5", "learned"])
def test_generate_with_a_cache_is_generate_without(name: str, tmp_path: Path) -> None:
    model = load(export(tmp_path, **MODELS[name]))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = torch.stack([IDS[:9], IDS[9:18]])
    mask = torch.ones_like(prompts)
    cached = model.generate(prompts, attention_mask=mask, **settings)
    assert torch.equal(cached, model.generate(prompts, attention_mask=mask, use_cache=False, **settings))
    logprobs = plain_logprobs(tmp_path / "model", cached[0, :-1].tolist())
    assert logprobs[8:].argmax(-1).tolist() == cached[0, 9:].tolist()


def test_losses_and_kept_logits(tmp_path: Path) -> None:
    model = load(export(tmp_path))
    with torch.inference_mode():
        whole = model(IDS[None], labels=IDS[None])
        last = model(IDS[None], logits_to_keep=1).logits
    wanted = -plain_logprobs(tmp_path / "model", IDS.tolist())[:-1].gather(1, IDS[1:, None]).mean()
    assert float(whole.loss) == pytest.approx(float(wanted), abs=1e-5)
    assert last.shape == (1, 1, 304)
    assert torch.allclose(last, whole.logits[:, -1:], atol=1e-5)


def test_half_precision_keeps_the_position_wide(tmp_path: Path) -> None:
    folder = export(tmp_path, position={"kind": "kerple"}, dape={"width": 7}, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.final_linear.weight.dtype == torch.bfloat16
    assert model.layers[0].attention.position.bias_p.dtype == torch.float32
    wanted = stepped_logits(make_runner(tmp_path / "model"), IDS.tolist(), [40])
    for narrow in (model, model.bfloat16(), model.half()):
        assert (narrow(IDS[None]).logits[0] - wanted).abs().max() < 0.05 * wanted.abs().max()


ALONE = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" in path or not path.startswith({root!r})]
class Refuse:
    def find_spec(self, name, *_):
        assert not name.startswith("dape_"), name
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
ids = tokenizer("It was the best", return_tensors="pt")
found = model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
print(found.shape[1] - ids["input_ids"].shape[1])
"""


def test_it_loads_without_this_project(tmp_path: Path) -> None:
    folder = export(tmp_path, position={"kind": "kerple"}, dape={"width": 7}, eos_token_id=None)
    root = str(Path(__file__).parents[1])
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = ALONE.format(root=root, folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"
    assert "You are using a model of type" not in done.stderr


def test_the_folder_is_still_a_model_folder(tmp_path: Path) -> None:
    folder = export(tmp_path)
    assert load_config(folder) == load_config(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["auto_map"]["AutoModelForCausalLM"] == "modeling_dape.DapeForCausalLM"
    with pytest.raises(ModelFolderError, match="exists already"):
        export_hf(tmp_path / "model", folder)
    with pytest.raises(ModelFolderError, match="cannot read"):
        export_hf(tmp_path, tmp_path / "new")


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    model = load(export(tmp_path))
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(IDS[None], output_attentions=True)
