"""Small models with random weights, written as model folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dape_engine.config import ModelConfig
from dape_engine.loading import load_model
from dape_engine.model import DapeForCausalLM, initialise
from dape_engine.weights import save_model_folder
from dape_kernels.reference import reference_attention
from dape_training.data import train_tokenizer

TEXT = [
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity — “naïve” 🙂."
]
DAPE_KERPLE = {"position": {"kind": "kerple"}, "dape": {"width": 8}}


def write_model(folder: Path, *, max_model_len: int = 512, **settings: Any) -> Path:
    """Write a two-layer model of 4 heads x 8 with weights far from their initial values."""
    tokenizer = train_tokenizer(TEXT, 300)
    sizes = {
        "vocab_size": 304,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "train_length": 32,
        "max_model_len": max_model_len,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    save_model_folder(folder, random_model({**sizes, **(settings or DAPE_KERPLE)}), tokenizer)
    return folder


def random_model(settings: dict[str, Any], seed: int = 0) -> DapeForCausalLM:
    """Return a model with weights far from their initial values."""
    torch.manual_seed(seed)
    model = DapeForCausalLM(ModelConfig.model_validate(settings))
    initialise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False)


def plain_logprobs(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of what follows each token, by the reference attention."""
    model = load_model(folder, torch.float32, torch.device("cpu"))
    encodings = [encoding.encoding() for encoding in model.encodings]

    def attend(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in qkv)
        return reference_attention(query, key, value, encodings[layer], segments)[0].transpose(0, 1)

    positions, segments = model.places(torch.tensor(ids))
    segments = None if segments is None else segments[None]
    with torch.inference_mode():
        hidden = model(torch.tensor(ids), positions, attend)
        return model.final_linear(hidden).log_softmax(-1)
