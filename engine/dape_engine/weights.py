"""Model folders: `config.json`, safetensors weights and the tokenizer. Pickle is never read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from dape_engine.config import ModelConfig
from dape_engine.errors import ModelFolderError, SettingsError
from dape_engine.files import check_regular, read_json
from dape_engine.model import DapeForCausalLM

logger = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
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


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, yarn_factor: float | None = None
) -> DapeForCausalLM:
    """Build the model of a folder and load its weights; `yarn_factor` as of `load_config`.

    Positional parameters are kept in float32 whatever `dtype` is: biases are never half precision.

    Raises:
        SettingsError: as `load_config`.
        ModelFolderError: a file is missing or damaged, or its tensors do not fit `config.json`.
    """
    config = load_config(folder, yarn_factor)
    with torch.device("meta"):
        model = DapeForCausalLM(config)
    state = _read_tensors(folder)
    _share_tied(config, state)
    expected = model.state_dict()
    _check_tensors(folder, expected, state)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            wanted = torch.float32 if ".position." in name else dtype
            state[name] = tensor.to(device=device, dtype=wanted)
        else:
            state[name] = tensor.to(device)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def save_model_folder(folder: Path, model: DapeForCausalLM, tokenizer: Tokenizer) -> None:
    """Write a model folder that `load_model` reads; tensors are stored in `config.dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    dtype = getattr(torch, config.dtype)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue  # tied to a tensor already stored
        seen.add(id(tensor))
        narrow = tensor.is_floating_point() and ".position." not in name
        tensors[name] = tensor.detach().to("cpu", dtype if narrow else tensor.dtype).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
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


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        check_regular(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except OSError as error:
            raise ModelFolderError(f"cannot read {path}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise ModelFolderError(f"{path} is damaged: {error}") from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights."""
    index, whole = folder / WEIGHTS_INDEX, folder / WEIGHTS
    if not index.exists():
        if not whole.exists() and not whole.is_symlink():
            raise ModelFolderError(f"{folder} holds no {WEIGHTS} (only safetensors weights are read)")
        return [whole]
    return indexed_files(index, ".safetensors")


def indexed_files(index: Path, suffix: str) -> list[Path]:
    """Return the files that an index of shards names, which lie beside it.

    Raises:
        ModelFolderError: the index is damaged, or a name leads out of the folder or ends in no `suffix`.
    """
    try:
        names = list(read_json(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(f"{index} is damaged: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise ModelFolderError(f"{index} names the file {name!r}, which is not in the folder")
    return [index.with_name(name) for name in sorted(set(names))]


def _share_tied(config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Fill in the names of tensors that are stored once and used in several places."""
    first = "layers.0.attention.position.weight"
    if config.position.kind == "t5" and first in state:
        for layer in range(1, config.num_hidden_layers):
            state.setdefault(f"layers.{layer}.attention.position.weight", state[first])
    if config.tie_word_embeddings and "word_embeddings.weight" in state:
        state.setdefault("final_linear.weight", state["word_embeddings.weight"])


def _check_tensors(folder: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("holds the unknown", unknown)
        shown = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
        raise ModelFolderError(f"{folder} {what} {len(names)} tensor(s): {shown}")
    for name, tensor in state.items():
        if tensor.is_floating_point() != expected[name].is_floating_point() or tensor.is_complex():
            raise ModelFolderError(f"{folder}: tensor {name} has the unexpected type {tensor.dtype}")
        if tensor.shape != expected[name].shape:
            raise ModelFolderError(
                f"{folder}: tensor {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(expected[name].shape)}"
            )
