"""GPT-NeoX checkpoints as training writes them, made from the engine's models."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dape_engine.model import DapeForCausalLM
from dape_training.data import train_tokenizer
from models import TEXT, random_model

SIZES = {
    "vocab_size": 304,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "train_length": 32,
    "max_model_len": 64,
}
YAML = {
    "num-layers": 2,
    "hidden-size": 32,
    "num-attention-heads": 4,
    "seq-length": 32,
    "max-position-embeddings": 64,
    "no-weight-tying": True,
    "norm": "layernorm",
    "make_vocab_size_divisible_by": 16,
    "zero_optimization": {"stage": 1},
}
AXES = {
    "word_embeddings.weight": 0,
    "final_linear.weight": 0,
    "attention.query_key_value.weight": 0,
    "attention.query_key_value.bias": 0,
    "mlp.linear1.weight": 0,
    "mlp.linear1.bias": 0,
    "attention.dense.weight": 1,
    "mlp.linear2.weight": 1,
    "attention.rpe.weight": 1,
    "attention.alibi_embed.slopes": 0,
    "attention.kerple.bias_p": 0,
    "attention.kerple.bias_a": 0,
}

State = dict[int, dict[str, Tensor]]
"""By pipeline index, tensors by key."""


def make_model(**settings: Any) -> DapeForCausalLM:
    return random_model({**SIZES, **settings}, seed=3)


def neox_state(model: DapeForCausalLM, module: str) -> State:
    """The tensors of a model under their official names; `module` is that of the positional parameters."""
    layers = len(model.layers)
    state: State = {}
    for name, tensor in model.state_dict().items():
        place, _, key = name.partition(".")
        index = {
            "word_embeddings": 0,
            "position_embeddings": 0,
            "norm": layers + 3,
            "final_linear": layers + 4,
        }
        if place == "layers":
            number, _, key = key.partition(".")
            key = key.replace("attention.position.", f"attention.{module}.")
            state.setdefault(int(number) + 2, OrderedDict())[key] = tensor.clone()
        else:
            state.setdefault(index[place], OrderedDict())[name] = tensor.clone()
    return state


def write_checkpoint(
    folder: Path, state: State, ranks: int = 1, *, single: bool = False, **settings: Any
) -> Path:
    """Write `global_step10` with its settings, the file `latest` and a tokenizer; return the folder above."""
    step = folder / "global_step10"
    (step / "configs").mkdir(parents=True)
    (folder / "latest").write_text("global_step10")
    yaml = {**YAML, "model-parallel-size": ranks, **settings}
    (step / "configs" / "model.yml").write_text(json.dumps(yaml, indent=1))
    train_tokenizer(TEXT, 300).save(str(folder / "tokenizer.json"))
    for rank in range(ranks):
        parts = {
            index: OrderedDict((key, _part(key, tensor, rank, ranks)) for key, tensor in tensors.items())
            for index, tensors in state.items()
        }
        whole: dict[str, Any] = {
            "random_rng_state": (3, (1, 2), None),
            "args": {"num_layers": 2},
            "module": None,
        }
        if single:
            whole["module"] = OrderedDict(
                (f"sequential.{index}.{key}", tensor)
                for index, part in parts.items()
                for key, tensor in part.items()
            )
        else:
            for index, part in parts.items():
                torch.save(part, step / f"layer_{index:02}-model_{rank:02}-model_states.pt")
        torch.save(whole, step / f"mp_rank_{rank:02}_model_states.pt")
    return folder


def _part(key: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    axis = AXES.get(key)
    return tensor.clone() if axis is None else tensor.chunk(ranks, axis)[rank].clone()
