"""Int8 weights: the definition, every build of the C++ library against it, and whole engines."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dape_engine.errors import ModelFolderError
from dape_engine.inspection import InspectionRequest
from dape_engine.loading import ModelLoader
from dape_engine.options import EngineOptions
from dape_engine.request import Window
from dape_kernels.attention import BACKENDS
from dape_kernels.quantized import LEVELS, Int8Linear, quantise
from dape_server.cli import main
from engines import drawn, engine_of, generate, score, tokens
from layers import relative_error
from models import DAPE_KERPLE, random_model, write_model

CPU = torch.device("cpu")
INT8 = EngineOptions(quantization="int8")
SIZES = {
    "vocab_size": 211,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "train_length": 32,
    "max_model_len": 64,
    **DAPE_KERPLE,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_becomes_the_nearest_level(dtype: torch.dtype) -> None:
    weight = (torch.randn(37, 50) * torch.logspace(-3, 2, 37)[:, None]).to(dtype)
    levels, scale = quantise(weight)
    assert (levels.dtype, scale.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(scale, weight.float().abs().amax(-1) / LEVELS)
    assert bool((levels.abs().amax(-1) == LEVELS).all())
    error = (levels.float() * scale[:, None] - weight.float()).abs() / scale[:, None]
    assert float(error.max()) <= 0.5 + 1e-4
    opposite, _ = quantise(-weight)
    assert torch.equal(opposite, -levels)


def test_long_weights_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 16)
    whole = quantise(weight)
    monkeypatch.setattr("dape_kernels.quantized.PIECE", 40)
    assert all(map(torch.equal, quantise(weight), whole))


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(3, 8)
    weight[1] = torch.finfo(torch.float32).smallest_normal / 1e6
    weight[2, 3] = -2
    levels, scale = quantise(weight)
    assert not levels[:2].any()
    assert levels[2].tolist() == [0, 0, 0, -LEVELS, 0, 0, 0, 0]
    assert bool(scale.isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(2, 8)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="not a finite number"):
        quantise(weight)


def random_linear(inputs: int, outputs: int) -> Int8Linear:
    """A layer whose scales differ from output to output."""
    linear = Int8Linear(inputs, outputs)
    weight = torch.randn(outputs, inputs) / math.sqrt(inputs) * torch.linspace(0.2, 3, outputs)[:, None]
    linear.weight, linear.scale = quantise(weight)
    linear.bias = torch.randn(outputs)
    return linear


ROWS = [1, 6, 7, 13, 16, 25, 49, 200]
"""On both sides of every number of rows at which the library changes its way."""


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (8, 211), (400, 64)])
def test_every_build_multiplies_as_defined(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    model = random_model(SIZES)
    linear = random_linear(inputs, outputs)
    caches = [BACKENDS["cpu"].cache.allocate(1, 16, 4, 8, dtype, CPU) for _ in model.layers]
    encodings = [BACKENDS["cpu"].prepare(e.encoding(), 16, CPU) for e in model.encodings]
    modules = replace(model.decoder_modules(), output=linear, dtype=dtype)
    decoder = BACKENDS["cpu"].decoder(modules, caches, encodings, 16)
    for rows in ROWS:
        x = torch.randn(rows, inputs).to(dtype)
        bias = 0 if linear.bias is None else linear.bias.double()
        wanted = x.double() @ linear.dequantised().double().t() + bias
        assert relative_error(decoder.logits(x), wanted) < 3e-6, rows
        rounding = 1e-6 if dtype == torch.float32 else 2e-2
        assert relative_error(linear(x), wanted) < rounding, rows


async def texts_and_scores(folder: Path, **options: Any) -> tuple[list[int], Tensor]:
    ids = tokens(5, 60)
    async with engine_of(folder, block_size=16, **options) as engine:
        return drawn(await generate(engine, ids)), torch.tensor(await score(engine, ids, Window(0, 60, 1)))


@pytest.mark.usefixtures("cpu")
async def test_the_library_and_pytorch_serve_the_same_int8_model(folder: Path) -> None:
    fused = await texts_and_scores(folder, quantization="int8", attention_backend="cpu")
    defined = await texts_and_scores(folder, quantization="int8", attention_backend="reference")
    assert fused[0] == defined[0]
    torch.testing.assert_close(fused[1], defined[1], rtol=0, atol=1e-4)
    _, plain = await texts_and_scores(folder)
    assert 1e-3 < float((fused[1] - plain).abs().max()) < 0.5


async def test_narrow_activations_stay_near_wide_ones(folder: Path) -> None:
    _, wide = await texts_and_scores(folder, quantization="int8")
    for backend in ("cpu", "chunked"):
        options = {"dtype": "bfloat16", "attention_backend": backend}
        _, narrow = await texts_and_scores(folder, quantization="int8", **options)
        assert 0 < float((narrow - wide).abs().max()) < 0.5


async def test_inspections_see_the_quantised_weights(folder: Path) -> None:
    request = InspectionRequest("i", tokens(2, 20), 19, (1,), (0, 3))
    found = []
    for backend in ("cpu", "reference"):
        async with engine_of(folder, block_size=16, quantization="int8", attention_backend=backend) as engine:
            found.append((await engine.inspect(request)).layers[0].scores)
    torch.testing.assert_close(*map(torch.from_numpy, found), rtol=0, atol=1e-4)


def test_weights_that_cannot_be_quantised_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    name = "layers.1.mlp.linear1.weight"
    stored[name][3, 4] = math.nan
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match=f"tensor {name} cannot be quantised: a weight is not"):
        ModelLoader(folder, torch.float32, CPU, INT8).load()


def test_unknown_kinds_are_refused_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dape", "generate", str(folder), "the", "--quantization", "int3"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "'--quantization': 'int3'" in capsys.readouterr().err
    with pytest.raises(ValidationError, match="quantization"):
        EngineOptions(quantization="int3")
