"""BiPE: segments of tokens, biases between them over a paged cache, and the engine's way of finding them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dape_engine.config import DapeConfig, PositionConfig
from dape_engine.inspection import InspectionRequest
from dape_engine.request import SamplingParams, Window
from dape_engine.segments import split_segments
from dape_kernels.attention import BACKENDS, paged_attention, select_backend
from dape_kernels.dense import attention, dense_attention
from dape_kernels.dense.blocks import BlockSize
from dape_kernels.reference import reference_attention
from dape_training.data import segment_tokens, train_tokenizer
from engines import drawn, engine_of, generate, score, tokens
from layers import Layer, PeakMemory, page, random_encoding, random_module, random_sequence, relative_error
from models import plain_logprobs, write_model

BIPE = PositionConfig(kind="bipe", segment_tokens=(1,))
LAYERS: dict[str, Layer] = {
    "plain": (BIPE, None),
    "v1": (BIPE, DapeConfig(width=7)),
    "v2-k3": (BIPE, DapeConfig(version=2, width=5, kernel=3)),
}
MODEL: dict[str, Any] = {"position": {"kind": "bipe", "segment_tokens": [3, 5, 8, 130]}, "dape": {"width": 8}}


def test_a_segment_goes_up_to_its_last_token() -> None:
    ids = torch.tensor([[7, 7, 9, 7, 9, 9, 7], [9, 7, 7, 7, 7, 7, 9]])
    segments, inside = split_segments(ids, torch.tensor([9, 11]))
    assert segments.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert inside.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]


def test_a_text_can_be_split_in_parts() -> None:
    ids, ends = torch.tensor([7, 9, 7, 7, 7, 9, 9, 7]), torch.tensor([9])
    segments, inside = split_segments(ids, ends)
    later = split_segments(ids[3:], ends, int(segments[3]), int(inside[3]))
    assert torch.equal(later[0], segments[3:])
    assert torch.equal(later[1], inside[3:])


def test_newlines_and_ends_of_sentences_end_segments() -> None:
    tokenizer = train_tokenizer(["One. Two!\nThree? Four, five\n" * 9], 300)
    ends = segment_tokens(tokenizer)
    assert ends[0] == tokenizer.token_to_id("<|endoftext|>")
    assert {tokenizer.token_to_id(text) for text in (".", "!", "?", "Ċ")} <= set(ends)
    assert not {tokenizer.token_to_id(text) for text in (",", "a", "Ġ")} & set(ends)


def random_segments(count: int, length: int, seed: int = 0) -> Tensor:
    """Segments int64 [count, length] of random sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, length, generator=generator) < 0.2).long().cumsum(-1)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("workspace", [1 << 14, 1 << 20], ids=["many-tiles", "one-tile"])
@pytest.mark.parametrize("name", ["chunked", "reference"])
def test_a_paged_cache_gives_the_definition(name: str, layer: str, workspace: int) -> None:
    """Chunks and decode rows of several sequences whose blocks lie in any order."""
    backend, encoding = BACKENDS[name], random_encoding(LAYERS[layer], 3, 5)
    generator = torch.Generator().manual_seed(0)
    spans = [(61, 61), (90, 1), (70, 23), (1, 1)]
    sequences = [random_sequence(rows, length, 3, 5, torch.float64, generator) for length, rows in spans]
    paged = page(backend, sequences, 4, seed=1)
    plane = torch.full((paged.cache.num_blocks * 4,), 999)
    expected = []
    for index, ((length, _), (query, key, value)) in enumerate(zip(spans, sequences, strict=True)):
        segments = random_segments(1, length, seed=index)
        plane[paged.batch.key_slots(torch.tensor(index), torch.arange(length))] = segments[0]
        output = reference_attention(query, key, value, encoding, segments)
        by_position = reference_attention(query, key, value, replace(encoding, segmented=False))
        assert length == 1 or relative_error(by_position, output) > 1e-3
        expected.append(output[0].transpose(0, 1))
    batch = replace(paged.batch, segments=plane)
    output, _ = paged_attention(
        paged.query, paged.cache, batch, encoding, backend=backend, workspace=workspace
    )
    assert relative_error(output, torch.cat(expected)) < 1e-9


@pytest.mark.parametrize("layer", LAYERS)
def test_the_workspace_bounds_memory(layer: str) -> None:
    backend, encoding = BACKENDS["chunked"], random_encoding(LAYERS[layer], 4, 16, torch.float32)
    generator = torch.Generator().manual_seed(0)
    paged = page(backend, [random_sequence(40, 900, 4, 16, torch.float32, generator)], 16)
    batch = replace(paged.batch, segments=torch.arange(paged.cache.num_blocks * 16) // 7)
    arguments: dict[str, Any] = {"backend": backend, "workspace": 1 << 17}
    paged_attention(paged.query, paged.cache, batch, encoding, **arguments)  # makes the plan
    with PeakMemory() as memory:
        output, lse = paged_attention(paged.query, paged.cache, batch, encoding, **arguments)
    results = output.untyped_storage().nbytes() + lse.untyped_storage().nbytes()
    assert results < memory.peak <= results + (1 << 17)


@pytest.mark.parametrize("kept", [0, 1 << 30], ids=["recomputed", "kept"])
@pytest.mark.parametrize("layer", LAYERS)
def test_training_has_the_gradients_of_the_definition(
    layer: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CPU_BLOCK", BlockSize(pairs=3 * 16 * 37, rows=16))
    monkeypatch.setattr(attention, "KEPT_BYTES", kept)
    module = random_module(LAYERS[layer], heads=3, head_dim=4).double()
    generator = torch.Generator().manual_seed(0)
    drawn = [random_sequence(37, 37, 3, 4, torch.float64, generator) for _ in range(5)]
    leaves = [torch.cat(parts).requires_grad_() for parts in zip(*drawn, strict=True)]
    found = []
    for attend in (dense_attention, reference_attention):
        output = attend(leaves[0], leaves[1], leaves[2], module.encoding(), random_segments(5, 37))
        wanted = [*leaves, *module.parameters()]
        found.append((output.detach(), torch.autograd.grad(output.square().sum(), wanted)))
    (actual, gradients), (expected, others) = found
    assert relative_error(actual, expected) < 1e-12
    limit = 1e-10 * max(float(other.abs().max()) for other in others)
    for gradient, other in zip(gradients, others, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-9, atol=limit)


def test_the_fused_backend_says_why_it_cannot() -> None:
    layer = (random_encoding(LAYERS["v1"], 3, 8), torch.float32, torch.device("cpu"), 16)
    with pytest.raises(ValueError, match=r"cpu: does not support biases of segments \(BiPE\)"):
        select_backend("cpu", *layer)
    assert select_backend("auto", *layer).name == "chunked"


async def test_company_chunks_and_shared_prefixes_change_nothing(tmp_path: Path) -> None:
    """Greedy tokens and log-probabilities are the model's own, alone or beside others, cached or not."""
    folder = write_model(tmp_path, **MODEL)
    prompt = tokens(1, 70)
    async with engine_of(folder) as engine:
        assert engine.backend_name == "chunked"
        sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        generated = drawn(await generate(engine, prompt, sampling))
        again = drawn(await generate(engine, prompt, sampling))
        longer = (*prompt, *generated)
        (cached,) = await score(engine, longer, Window(0, len(longer), len(prompt)))
        (fresh,) = await score(engine, longer[1:], Window(0, len(longer) - 1, 1))
    exact = plain_logprobs(folder, longer)
    assert generated == again == exact.argmax(-1)[len(prompt) - 1 : -1].tolist()
    wanted = exact[:-1].gather(1, torch.tensor(longer)[1:, None])[:, 0]
    assert cached == pytest.approx(wanted[len(prompt) - 1 :].tolist(), abs=1e-4)
    shifted = plain_logprobs(folder, longer[1:])[:-1]
    wanted = shifted.gather(1, torch.tensor(longer)[2:, None])[:, 0]
    assert fresh == pytest.approx(wanted.tolist(), abs=1e-4)


async def test_an_inspected_bias_is_of_segments(tmp_path: Path) -> None:
    ids = (3, 4, 4, 5, 6, 3, 7, 7)
    async with engine_of(write_model(tmp_path, **MODEL)) as engine:
        found = await engine.inspect(InspectionRequest("i", ids, 7, (1,), (0,)))
    bias = found.layers[0].static_bias[0]
    segments = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3])
    assert (bias / bias[5]).tolist() == pytest.approx((3 - segments).tolist())
