"""Reads golden vectors: tensors of one attention layer, made by the official DAPE modules."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dape_engine.config import DapeConfig, PositionConfig
from dape_engine.encoding import PositionalEncoding, Rotary
from dape_kernels.encoding import Encoding, RightEdge

KINDS = {"t5rpe": "t5"}  # where our name differs from the file's


@dataclass(frozen=True, slots=True)
class Golden:
    """One golden file. Letters: B sequences, H heads, S tokens, d head size, R kept rows."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Golden:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return cls(json.loads(file.metadata()["golden"]), tensors)

    @property
    def reach(self) -> int:
        """How many of the last rows depend on where the matrix ends."""
        return int(self.about["kernel"]) // 2

    def position_config(self) -> PositionConfig:
        about, tensors = self.about, self.tensors
        settings: dict[str, Any] = {}
        if about["pos"] == "rope":
            settings = {"base": about["rope_base"], "fraction": about["rope_pct"]}
        elif about["pos"] == "fire":
            settings = {"mlp_width": len(tensors["param.mlp.0.bias"])}
        elif about["pos"] == "cope":
            settings = {"max_positions": tensors["param.pos_emb"].shape[-1]}
        return PositionConfig(kind=KINDS.get(about["pos"], about["pos"]), **settings)

    def dape_config(self, right_edge: RightEdge) -> DapeConfig | None:
        about = self.about
        if about["dape"] == "none":
            return None
        return DapeConfig(
            version=int(about["dape"].removeprefix("v")),
            width=about["hidden"],
            kernel=max(about["kernel"], 1),
            right_edge=right_edge,
        )

    def encoding(self, dtype: torch.dtype, right_edge: RightEdge = "official") -> Encoding:
        """The layer's score function with the parameters of the file."""
        heads, head_dim = self.about["heads"], self.about["head_dim"]
        module = PositionalEncoding(self.position_config(), self.dape_config(right_edge), heads, head_dim)
        prefix = "param."
        state = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        module.load_state_dict(state)
        return module.to(dtype).requires_grad_(False).encoding()

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, S, d]; q and k rotated where the encoding is rotary."""
        query, key, value = (self.tensors[name].to(dtype) for name in "qkv")
        if self.about["pos"] == "rope":
            rotary = Rotary(self.position_config(), self.about["head_dim"], train_length=1)
            positions = torch.arange(query.shape[2])
            turned = rotary(query.transpose(1, 2), key.transpose(1, 2), positions)
            query, key = (x.transpose(1, 2) for x in turned)
        return query, key, value
