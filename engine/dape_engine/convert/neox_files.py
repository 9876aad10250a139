"""GPT-NeoX checkpoints on disk: which files there are, and one checkpoint out of the ranks' parts."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dape_engine.convert.neox_settings import NeoxSettings
from dape_engine.convert.pickles import read_pickle, tensors_of
from dape_engine.convert.stored import Checkpoint, Stored
from dape_engine.errors import ModelFolderError

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")

# The axis along which the ranks of model parallelism share a tensor; all others are replicas.
AXES = {
    **{
        f"{name}.{kind}": 0
        for name in ("attention.query_key_value", "mlp.linear1", "mlp.dense_h_to_4h")
        for kind in ("weight", "bias")
    },
    **{f"{name}.weight": 1 for name in ("attention.dense", "mlp.linear2", "mlp.dense_4h_to_h")},
    "word_embeddings.weight": 0,
    "attention.rpe.weight": 1,
}
OUTPUT = "final_linear.weight"
# With parallel residuals each rank adds its own bias before the sum over ranks, else all add the same once.
ROW_BIASES = ("attention.dense.bias", "mlp.linear2.bias", "mlp.dense_4h_to_h.bias")
# Cut by heads in GPT-NeoX; the DAPE code gives each rank those of all heads.
HEAD_PARAMETERS = ("slopes", "bias_p", "bias_a")


def checkpoint_folder(path: Path) -> Path:
    """Return the folder with the weights: the one given, or the one that its file `latest` names.

    Raises:
        ModelFolderError: there are no weights.
    """
    if not path.is_dir():
        raise ModelFolderError(f"no checkpoint folder {str(path)!r}")
    folder, latest = path, path / "latest"
    if not _has_weights(folder) and latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        folder = path / name
        if Path(name).name != name or name == ".." or not folder.is_dir():
            raise ModelFolderError(f"{latest} names the folder {name!r}, which is not there")
    if not _has_weights(folder):
        raise ModelFolderError(
            f"{folder} holds neither layer_00-model_00-model_states.pt nor mp_rank_00_model_states.pt"
        )
    return folder


def _has_weights(folder: Path) -> bool:
    return bool(_files(folder, LAYER_FILE) or _files(folder, RANK_FILE))


def read_ranks(folder: Path) -> list[Checkpoint]:
    """Return the tensors of each rank of model parallelism, named `sequential.<index>.<key>`.

    Raises:
        ModelFolderError: a file is missing or damaged.
    """
    layers = _files(folder, LAYER_FILE)
    if not layers:
        files = _files(folder, RANK_FILE)
        _check_ranks(folder, {int(rank) for (rank,) in files}, len(files), "mp_rank_{:02}_model_states.pt")
        return [_module(files[key]) for key in sorted(files, key=lambda key: int(key[0]))]
    count = 1 + max(int(rank) for _, rank in layers)
    ranks: list[Checkpoint] = [{} for _ in range(count)]
    for index in sorted({index for index, _ in layers}, key=int):
        present = {int(rank): path for (other, rank), path in layers.items() if other == index}
        _check_ranks(folder, set(present), count, f"layer_{index}-model_{{:02}}-model_states.pt")
        for rank, path in present.items():
            tensors = tensors_of(read_pickle(path))
            ranks[rank] |= {f"sequential.{int(index)}.{key}": tensor for key, tensor in tensors.items()}
    return ranks


def join_ranks(ranks: list[Checkpoint], settings: NeoxSettings) -> Checkpoint:
    """Return one checkpoint out of the parts that the ranks hold.

    Args:
        ranks: the tensors of each rank.
        settings: of the training run.

    Raises:
        ModelFolderError: a rank lacks a tensor, or the parts do not fit together.
    """
    if len(ranks) == 1:
        return ranks[0]
    joined: Checkpoint = {}
    for name in {name: None for rank in ranks for name in rank}:
        missing = [rank for rank, tensors in enumerate(ranks) if name not in tensors]
        if missing:
            raise ModelFolderError(f"tensor {name} is missing on rank {missing[0]} of {len(ranks)}")
        joined[name] = _join(name, [tensors[name] for tensors in ranks], settings)
    return joined


def _join(name: str, parts: list[Stored], settings: NeoxSettings) -> Stored:
    key = name.split(".", 2)[2]
    first = parts[0]
    axis = AXES.get(key)
    if key == OUTPUT:
        axis = 0 if first.shape[1:] == (settings.hidden_size,) else 1
    if key.rpartition(".")[2] in HEAD_PARAMETERS and first.shape[:1] != (settings.num_attention_heads,):
        axis = 0
    if axis is None:
        summed = settings.gpt_j_residual and key in ROW_BIASES
        return Stored(first.shape, first.dtype, partial(_sum if summed else _same, name, parts))
    for part in parts:
        if len(part.shape) <= axis or part.shape != first.shape or part.dtype != first.dtype:
            raise ModelFolderError(
                f"tensor {name} has shape {list(part.shape)} on one rank and {list(first.shape)} on the first"
            )
    shape = list(first.shape)
    shape[axis] *= len(parts)
    return Stored(tuple(shape), first.dtype, partial(_concatenate, parts, axis))


def _concatenate(parts: list[Stored], axis: int) -> Tensor:
    return torch.cat([part.read() for part in parts], axis)


def _sum(_: str, parts: list[Stored]) -> Tensor:
    return torch.stack([part.read() for part in parts]).double().sum(0)


def _same(name: str, parts: list[Stored]) -> Tensor:
    first = parts[0].read()
    for rank, part in enumerate(parts[1:], 1):
        if not torch.equal(part.read(), first):
            raise ModelFolderError(f"tensor {name} is a replica and differs between ranks 0 and {rank}")
    return first


def _module(path: Path) -> Checkpoint:
    """Return the weights of a file that holds a rank's whole state."""
    module = read_pickle(path).get("module")
    if not isinstance(module, dict) or not tensors_of(module):
        raise ModelFolderError(f'{path} holds no weights: its "module" has no tensors')
    names = {name.removeprefix("module."): tensor for name, tensor in tensors_of(module).items()}
    for name in names:
        if not re.match(r"sequential\.\d+\.", name):
            raise ModelFolderError(f"{path}: tensor {name} is not named sequential.<index>.<key>")
    return names


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[str, ...], Path]:
    """Return the files of a folder with the numbers in their names."""
    found = ((pattern.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {match.groups(): path for match, path in found if match}


def _check_ranks(folder: Path, present: set[int], count: int, name: str) -> None:
    for rank in range(count):
        if rank not in present:
            raise ModelFolderError(f"{folder} lacks {name.format(rank)}")
