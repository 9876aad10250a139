"""Where a model's tensors come from: safetensors files, mapped into memory, or made up.

Nothing is read before it is used: tensors of a file are views of its mapping, and the pages that were read
are given back with the last of them. Pickle is never read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dape_engine.config import ModelConfig
from dape_engine.encoding import PositionalEncoding
from dape_engine.errors import ModelFolderError
from dape_engine.files import check_regular, read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
POSITION = ".attention.position."
"""In the names of positional parameters, which are float32 in every model."""
NOISE = 1_048_573
"""Random numbers that dummy weights are made of; a prime, so that the rows of a weight differ."""


class TensorSource(Protocol):
    """The tensors of one model."""

    names: frozenset[str]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors, in the type in which they are stored, on the CPU.

        Raises:
            ModelFolderError: a file is gone or damaged.
        """
        ...


class StoredTensors:
    """The tensors of a model folder.

    Raises:
        ModelFolderError: a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self._places: dict[str, Path] = {}
        for path in _weight_files(folder):
            check_regular(path)
            with _opened(path) as file:
                self._places.update(dict.fromkeys(file.keys(), path))  # type: ignore[no-untyped-call]
        self.names = frozenset(self._places)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `TensorSource`."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._places[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            # A mapping of its own for every call, which ends with the tensors.
            with _opened(path) as file:
                for name in wanted:
                    tensors[name] = file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensors


class DummyTensors:
    """Random weights of the usual size, always the same, for as little work as possible.

    Args:
        config: the model's settings.
        shapes: its tensors.
    """

    def __init__(self, config: ModelConfig, shapes: dict[str, torch.Size]):
        self._config = config
        self._shapes = shapes
        self.names = frozenset(shapes)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `TensorSource`."""
        return {name: self._make(name) for name in names}

    def _make(self, name: str) -> Tensor:
        if POSITION in name:
            config = self._config
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                own = PositionalEncoding(
                    config.position, config.dape, config.num_attention_heads, config.head_dim
                )
            made: Tensor = own.state_dict()[name.partition(POSITION)[2]]
            return made
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("norm.weight")), dtype=self._dtype)
        noise = (self._noise / math.sqrt(shape[-1])).to(self._dtype)
        count, start = shape.numel(), zlib.crc32(name.encode()) % NOISE
        return noise.repeat(-(-(start + count) // NOISE))[start : start + count].view(shape)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file, whose faults are those of the model folder."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise ModelFolderError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelFolderError(f"{path} is damaged: {error}") from error


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
