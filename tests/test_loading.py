"""Weights come in layer by layer, from mapped files or made up, and what does not fit is refused before."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dape_engine.engine import AsyncEngine
from dape_engine.errors import ModelFolderError, NoMemoryError, SettingsError
from dape_engine.inspection import InspectionRequest
from dape_engine.loading import ModelLoader, load_model
from dape_engine.model import DapeForCausalLM
from dape_engine.options import EngineOptions
from dape_engine.tensors import StoredTensors
from dape_kernels import host
from dape_kernels.host import available_memory
from engines import SMALL, drawn, engine_of, generate, tokens
from models import write_model

CPU = torch.device("cpu")
DUMMY = EngineOptions(load_format="dummy")
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def bare(folder: Path) -> Path:
    """A folder without weights."""
    (folder / "model.safetensors").unlink()
    return folder


def on_meta(model: DapeForCausalLM) -> list[bool]:
    """Of each layer, whether its linear weights are missing."""
    return [layer.mlp.linear2.weight.is_meta for layer in model.layers]


def test_a_decoder_never_has_two_layers_before_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fill = ModelLoader.fill

    def watched(loader: ModelLoader, model: DapeForCausalLM, index: int, *, exact: bool = True) -> None:
        assert all(on_meta(model))
        fill(loader, model, index, exact=exact)
        seen.append(on_meta(model))

    monkeypatch.setattr(ModelLoader, "fill", watched)
    AsyncEngine(folder, EngineOptions(**{**SMALL, "block_size": 16}))
    assert seen == [[False, True], [True, False]]


def test_memory_of_a_file_goes_with_its_tensors(folder: Path) -> None:
    source = StoredTensors(folder)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of mappings here")
    tensors = source.read(source.names)
    assert str(folder) in maps.read_text()
    del tensors
    assert str(folder) not in maps.read_text()


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_stored_bfloat16_serves_as_the_same_float32(
    tmp_path: Path, dtype: str, quantization: str | None
) -> None:
    """Whether a layer is widened before it is packed makes no difference."""
    found = []
    narrow = write_model(tmp_path / "narrow", dtype="bfloat16", position={"kind": "kerple"})
    wide = write_model(tmp_path / "wide", dtype="float32", position={"kind": "kerple"})
    model = load_model(narrow, torch.float32, CPU)
    save_file(dict(model.state_dict()), wide / "model.safetensors")
    for folder in (narrow, wide):
        options = {"dtype": dtype, "quantization": quantization, "block_size": 16}
        async with engine_of(folder, **options) as engine:
            found.append(drawn(await generate(engine, tokens(4, 30))))
    assert found[0] == found[1]


async def test_dummy_weights_need_no_file_and_are_always_the_same(bare: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"holds no model.safetensors"):
        AsyncEngine(bare, EngineOptions(**SMALL))
    found = []
    for backend in ("auto", "reference"):
        async with engine_of(bare, load_format="dummy", block_size=16, attention_backend=backend) as engine:
            found.append(drawn(await generate(engine, tokens(4, 30))))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"position": {"kind": "t5"}, "dape": {"width": 8}, "tie_word_embeddings": True},
        {"position": {"kind": "fire"}, "dtype": "bfloat16"},
        {"position": {"kind": "learned", "max_positions": 512}, "embedding_norm": True},
    ],
    ids=lambda settings: settings["position"]["kind"],
)
def test_dummy_weights_fit_every_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "model", **settings)
    stored = load_model(folder, torch.float32, CPU).state_dict()
    made = load_model(folder, torch.float32, CPU, DUMMY).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {
        n: (t.shape, t.dtype) for n, t in stored.items()
    }
    assert all(bool(tensor.isfinite().all()) for tensor in made.values())
    weight = made["layers.1.mlp.linear1.weight"]
    assert 0.5 < float(weight.std()) * weight.shape[1] ** 0.5 < 2
    assert len(weight.unique(dim=0)) == len(weight)
    if settings.get("tie_word_embeddings"):
        assert torch.equal(made["final_linear.weight"], made["word_embeddings.weight"])


def test_what_does_not_fit_is_refused_with_its_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dape_engine.memory.available_memory", lambda: 90 * MIB)
    message = r"does not fit: weights 0 MiB, KV cache 3[12] MiB and activations \d+ MiB, and 90 MiB"
    with pytest.raises(SettingsError, match=message):
        AsyncEngine(folder, EngineOptions(kv_cache_memory=32 * MIB))


async def test_an_inspection_without_room_for_its_weights_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_of(folder, block_size=16) as engine:
        request = InspectionRequest("i", tokens(2, 9), 8, (0,), (0,))
        with monkeypatch.context() as little:
            little.setattr("dape_engine.memory.available_memory", lambda: 1 << 10)
            with pytest.raises(NoMemoryError, match="weights again needs 0 MiB of memory, and 0 MiB are"):
                await engine.inspect(request)
        assert (await engine.inspect(request)).layers


@pytest.mark.parametrize(
    ("options", "packed", "bytes_each"),
    [({}, False, 4), ({}, True, 2), ({"quantization": "int8"}, True, 1)],
    ids=["in PyTorch", "packed", "int8"],
)
def test_the_weights_of_layers_are_counted_as_they_are_kept(
    tmp_path: Path, options: dict[str, Any], packed: bool, bytes_each: int
) -> None:
    folder = write_model(tmp_path / "model", dtype="bfloat16", position={"kind": "nope"})
    loader = ModelLoader(folder, torch.float32, CPU, EngineOptions(**options))
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    small = 2 * (4 * 32 + 3 * 32 + 32 + 64 + 32) + 2 * 32
    tables = 304 * 32
    assert loader.num_parameters == linear + small + 2 * tables
    rest = 4 * 2 * tables + (2 * tables if packed else 0)
    counted = loader.memory(packed=packed) - linear * bytes_each - rest
    assert 2 * small <= counted <= 4 * small


def test_a_container_has_what_its_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    machine = available_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > machine / 2
    (tmp_path / "memory.max").write_text(f"{10 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {3 * MIB}\nfile {5 * MIB}\nkernel {MIB}\n")
    assert available_memory() == 6 * MIB


def test_engines_tell_their_weights_apart(folder: Path) -> None:
    more: list[dict[str, Any]] = [{}, {"quantization": "int8"}, {"load_format": "dummy", "dtype": "bfloat16"}]
    names = [AsyncEngine(folder, EngineOptions(**{**SMALL, **options})).dtype_name for options in more]
    assert names == ["float32", "float32 int8", "bfloat16 dummy"]


def test_the_log_says_what_was_loaded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dape_engine.engine"):
        AsyncEngine(folder, EngineOptions(**SMALL))
    assert re.search(r"loaded 0M parameters in \d+\.\d s, peak RSS [1-9]\d* MiB", caplog.text)
