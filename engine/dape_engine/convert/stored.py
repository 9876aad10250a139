"""Tensors that lie in files: their names, shapes and dtypes, read when they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dape_engine.errors import ModelFolderError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint, not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


Checkpoint: TypeAlias = dict[str, Stored]
"""All tensors of a checkpoint by name."""


def read_safetensors(path: Path) -> Checkpoint:
    """List the tensors of a safetensors file.

    Raises:
        ModelFolderError: the file is missing, damaged or holds a dtype that no model here has.
    """
    tensors: Checkpoint = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                view = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise ModelFolderError(f"{path}: tensor {name} has the dtype {view.get_dtype()}")
                tensors[name] = Stored(tuple(view.get_shape()), dtype, partial(_read, path, name))
    except OSError as error:
        raise ModelFolderError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelFolderError(f"{path} is damaged: {error}") from error
    return tensors


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def size_of(checkpoint: Checkpoint, name: str, axis: int) -> int:
    """Return the size of a tensor along an axis.

    Raises:
        ModelFolderError: there is no such tensor, or it has no such axis.
    """
    if name not in checkpoint:
        raise ModelFolderError(f"the checkpoint lacks the tensor {name}")
    shape = checkpoint[name].shape
    if len(shape) <= axis:
        raise ModelFolderError(f"tensor {name} has shape {list(shape)}")
    return shape[axis]


def merge(parts: Iterable[tuple[Path, Checkpoint]]) -> Checkpoint:
    """Join the tensors of several files.

    Raises:
        ModelFolderError: two files hold a tensor of the same name.
    """
    merged: Checkpoint = {}
    for path, tensors in parts:
        for name, tensor in tensors.items():
            if name in merged:
                raise ModelFolderError(f"{path} holds the tensor {name}, and so does another file")
            merged[name] = tensor
    return merged
