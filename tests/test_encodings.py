"""Every encoding and form from training to serving: it learns, and the engine computes what training did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dape_engine.config import ModelConfig
from dape_engine.engine import AsyncEngine
from dape_engine.model import DapeForCausalLM, initialise
from dape_engine.request import ScoreRequest, Window
from dape_engine.weights import save_model_folder
from dape_kernels.dense import dense_attention
from dape_kernels.encoding import FORMS
from dape_training.data import train_tokenizer
from dape_training.trainer import NextTokenLoss
from engines import engine_of
from models import TEXT

SIZES = {
    "vocab_size": 304,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "train_length": 64,
    "max_model_len": 256,
}
POSITIONS: dict[str, dict[str, Any]] = {
    kind: {"kind": kind}
    for kind in ("nope", "alibi", "kerple", "kerple_power", "t5", "sandwich", "rope", "sinusoidal")
} | {
    "fire": {"kind": "fire", "init_length": 16},
    "cope": {"kind": "cope", "max_positions": 16},
    "learned": {"kind": "learned", "max_positions": 256},
    "bipe": {"kind": "bipe", "segment_tokens": [*range(0, 300, 9)]},
}
BIASES = ("alibi", "kerple", "kerple_power", "fire", "t5", "sandwich", "bipe")
WITHOUT_BIAS = ("nope", "rope", "learned", "sinusoidal")
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"position": position} for kind, position in POSITIONS.items()},
    **{
        f"{kind}-{form}": {"position": POSITIONS[kind], "dape": {"width": 8, "form": form}}
        for kind in BIASES
        for form, rule in FORMS.items()
        if rule.feeds_bias
    },
    **{f"{kind}-v1": {"position": POSITIONS[kind], "dape": {"width": 8}} for kind in WITHOUT_BIAS},
    **{
        f"{kind}-width-{width}": {"position": POSITIONS[kind], "dape": {"width": width}}
        for kind in ("alibi", "rope")
        for width in (4, 16, 32, 64)
    },
    **{
        f"{kind}-v2-k{kernel}": {
            "position": POSITIONS[kind],
            "dape": {"version": 2, "kernel": kernel, "width": 8},
        }
        for kind in (*BIASES, *WITHOUT_BIAS)
        for kernel in (3, 5)
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, 300)


def window(count: int, length: int) -> Tensor:
    """Token ids [count, length] of a text that can be learned."""
    period = torch.arange(count * length).reshape(count, length)
    return (period * 7) % 31 + period % 3 * 40


@pytest.mark.parametrize("case", CASES)
async def test_what_is_trained_is_what_is_served(case: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = DapeForCausalLM(ModelConfig.model_validate({**SIZES, **CASES[case]}))
    initialise(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loss_module = NextTokenLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    windows = window(4, 65)
    losses = []
    for _ in range(6):
        loss = loss_module(windows)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    for name, parameter in model.named_parameters():
        if ".position." in name:
            assert not torch.equal(parameter, before[name]), name
    save_model_folder(tmp_path, model, tokenizer)
    ids = window(1, 150)[0]
    async with engine_of(tmp_path, block_size=16, max_num_batched_tokens=37) as engine:
        served = await logprobs(engine, ids.tolist())
    assert served == pytest.approx(training_logprobs(model, ids), abs=1e-4)


@torch.no_grad()
def training_logprobs(model: DapeForCausalLM, ids: Tensor) -> list[float]:
    """Of each token but the first, by the attention of training."""
    encodings = [encoding.encoding() for encoding in model.encodings]
    positions, segments = model.places(ids[None])

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return dense_attention(query, key, value, encodings[layer], segments).transpose(1, 2)

    hidden = model(ids[None], positions, attend)
    scores = model.final_linear(hidden)[0, :-1].log_softmax(-1)
    found: list[float] = scores.gather(1, ids[1:, None])[:, 0].tolist()
    return found


async def logprobs(engine: AsyncEngine, ids: list[int]) -> list[float]:
    request = ScoreRequest("s", tuple(ids), (Window(0, len(ids), 1),))
    return [value async for scores in engine.score(request) for value in scores.logprobs]
