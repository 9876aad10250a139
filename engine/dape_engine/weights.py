"""Model folders: which one, its `config.json`, and how one is written."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from dape_engine.config import ModelConfig
from dape_engine.errors import ModelFolderError, SettingsError
from dape_engine.files import read_json
from dape_engine.model import DapeForCausalLM
from dape_engine.tensors import POSITION, WEIGHTS

SHIPPED = Path(__file__).parent / "models"
CONFIG = "config.json"
DEFAULT_MODEL = "dape-kerple-8m"


def resolve_model(name: str) -> Path:
    """Return the folder of a shipped model by its name, or the folder itself.

    Raises:
        ModelFolderError: there is no such folder.
    """
    shipped = SHIPPED / name
    folder = shipped if Path(name).name == name and shipped.is_dir() else Path(name)
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in SHIPPED.iterdir())) if SHIPPED.is_dir() else "none"
        raise ModelFolderError(f"no model folder {name!r} (shipped models: {known})")
    return folder


def load_config(folder: Path, yarn_factor: float | None = None) -> ModelConfig:
    """Read and check `config.json`.

    Args:
        folder: the model folder.
        yarn_factor: replaces that of a RoPE model.

    Raises:
        SettingsError: a YaRN factor for a model without RoPE.
        ModelFolderError: the file is missing, is not JSON or holds a wrong value.
    """
    path = folder / CONFIG
    settings = read_json(path)
    try:
        config = ModelConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "config"
        raise ModelFolderError(f"{path}: {field}: {first['msg']}") from error
    if yarn_factor is None:
        return config
    if config.position.kind != "rope":
        raise SettingsError(
            f"yarn_factor: {folder.name} has positions of kind {config.position.kind!r}; YaRN needs 'rope'"
        )
    return config.with_position(yarn_factor=yarn_factor)


def save_model_folder(folder: Path, model: DapeForCausalLM, tokenizer: Tokenizer) -> None:
    """Write a model folder that `load_model` reads; tensors are stored in `config.dtype`."""
    save_settings(folder, model.config, tokenizer)
    dtype = getattr(torch, model.config.dtype)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue  # tied to a tensor already stored
        seen.add(id(tensor))
        narrow = tensor.is_floating_point() and POSITION not in name
        tensors[name] = tensor.detach().to("cpu", dtype if narrow else tensor.dtype).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def save_settings(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write all of a model folder but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    # Of the position only what was set: the settings of other kinds would be noise.
    settings = {**config.model_dump(), "position": config.position.model_dump(exclude_unset=True)}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    # What other programs need to load tokenizer.json on its own.
    special = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id}
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: None if token is None else tokenizer.id_to_token(token) for name, token in special.items()},
        "model_max_length": config.max_model_len,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=2) + "\n")
