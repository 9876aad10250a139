"""PyTorch's pickled checkpoints, read by an unpickler that builds nothing but numbers, texts and containers.

A pickle is a program. Here it can call nothing of Python's or PyTorch's: the few names that stand for tensors
lead to records of this module, which say where a tensor's bytes lie in the file. Names that training code
leaves beside the weights (random states, arguments) lead to a record without content. Any other name, and
any instruction that no checkpoint needs, is an error.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dape_engine.convert.stored import Checkpoint, Stored
from dape_engine.errors import ModelFolderError

MAX_PROGRAM = 64 << 20
"""Bytes of the pickle itself; the tensors' bytes lie beside it."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What the training code's own state is made of. None of it is imported.
UNREAD_PACKAGES = ("megatron", "deepspeed")
UNREAD = {
    *(f"{module}.set" for module in ("builtins", "__builtin__")),
    *(
        "argparse.Namespace",
        "_codecs.encode",
        "torch.device",
        "torch.Generator",
        "numpy.ndarray",
        "numpy.dtype",
    ),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
# Instructions that leave the road over `find_class`, or that only other protocols need.
REFUSED = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}


class _Sealed:
    """An object that a pickle can hold but neither look into nor change."""

    __slots__ = ()

    def __setstate__(self, _: object) -> NoReturn:
        raise pickle.UnpicklingError("it changes an object that is not its own")


@dataclass(frozen=True)
class _StorageType(_Sealed):
    """`torch.FloatStorage` and its like."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage(_Sealed):
    """Bytes of the file that tensors are cut out of."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Layout(_Sealed):
    """A tensor: where it lies in its storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _RebuildTensor(_Sealed):
    """`torch._utils._rebuild_tensor_v2`."""

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: object) -> _Layout:
        whole = [offset, *shape, *stride]
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in whole):
            raise pickle.UnpicklingError("it describes a tensor wrongly")
        if len(shape) != len(stride):
            raise pickle.UnpicklingError("it describes a tensor wrongly")
        return _Layout(storage, offset, tuple(shape), tuple(stride))


class _RebuildParameter(_Sealed):
    """`torch._utils._rebuild_parameter`: the tensor itself."""

    def __call__(self, tensor: Any, *_: object) -> Any:
        return tensor


class _MakeTuple(_Sealed):
    """`torch.Size`."""

    def __call__(self, values: Any = ()) -> tuple[Any, ...]:
        return tuple(values)


class _Names(dict[Any, Any]):
    """A dictionary that drops what else was stored with it."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None: ...


class _MakeDict(_Sealed):
    """`collections.OrderedDict`."""

    def __call__(self, items: Any = ()) -> _Names:
        return _Names(items)


class _Unread:
    """What stands for training state: it takes whatever it is given and keeps none of it."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> _Unread:
        return object.__new__(cls)

    def _ignore(self, *_: object) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


NAMES: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
    "torch._utils._rebuild_parameter": _RebuildParameter(),
    "torch.Size": _MakeTuple(),
    "collections.OrderedDict": _MakeDict(),
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    """The unpickler: every name goes through `find_class`."""

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full in NAMES:
            return NAMES[full]
        if full in UNREAD or module.partition(".")[0] in UNREAD_PACKAGES:
            return _Unread
        raise pickle.UnpicklingError(f"it refers to {full}, which is no part of a tensor")

    def persistent_load(self, pid: Any, /) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int()):
                return _Storage(key, dtype)
        raise pickle.UnpicklingError("it describes a storage wrongly")


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the content of a file of `torch.save`: containers, numbers, texts and `Stored` tensors.

    Raises:
        ModelFolderError: the file is missing, damaged, in the format from before PyTorch 1.6, or its pickle
            does anything but describe tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(programs) != 1:
                raise ModelFolderError(f"{path} holds no data.pkl, so torch.save did not write it")
            root = programs[0].removesuffix("data.pkl")
            if archive.getinfo(programs[0]).file_size > MAX_PROGRAM:
                raise ModelFolderError(f"{path}: its pickle is above the limit of {MAX_PROGRAM} bytes")
            program = archive.read(programs[0])
            if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
                raise ModelFolderError(f"{path} was written by a big-endian machine")
            storages = _places(path, archive, root + "data/")
    except OSError as error:
        raise ModelFolderError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error) as error:
        raise ModelFolderError(
            f"{path} is damaged, or older than PyTorch 1.6 (then save it again with a newer one): {error}"
        ) from error
    try:
        _check_program(program)
        content = _Reader(io.BytesIO(program)).load()
    except Exception as error:  # a wrong pickle can raise anything
        raise ModelFolderError(
            f"{path} is not read: {' '.join(str(error).split()) or repr(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    return {str(key): _described(path, storages, value) for key, value in content.items()}


def tensors_of(content: dict[str, Any]) -> Checkpoint:
    """Return those entries of a pickle's content that are tensors."""
    return {name: value for name, value in content.items() if isinstance(value, Stored)}


def _check_program(program: bytes) -> None:
    """Refuse instructions that no checkpoint needs, and memory for places that the pickle cannot fill."""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name in REFUSED:
            raise pickle.UnpicklingError(f"it holds the instruction {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(program):
            raise pickle.UnpicklingError(f"it numbers an object {argument}")


def _places(path: Path, archive: zipfile.ZipFile, prefix: str) -> dict[str, tuple[int, int]]:
    """Return where the bytes of each storage begin in the file, and how many they are."""
    places = {}
    with path.open("rb") as file:
        for entry in archive.infolist():
            if not entry.filename.startswith(prefix):
                continue
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ModelFolderError(f"{path}: {entry.filename} is compressed")
            file.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            start = entry.header_offset + 30 + name_length + extra_length
            if start + entry.file_size > path.stat().st_size:
                raise ModelFolderError(f"{path} ends inside {entry.filename}")
            places[entry.filename.removeprefix(prefix)] = (start, entry.file_size)
    return places


def _described(path: Path, storages: dict[str, tuple[int, int]], value: Any) -> Any:
    """Replace a layout, or those in a dictionary, by tensors that can be read; deeper ones are nobody's."""
    if isinstance(value, dict):
        return {
            str(key): _stored(path, storages, inner) if isinstance(inner, _Layout) else inner
            for key, inner in value.items()
        }
    return _stored(path, storages, value) if isinstance(value, _Layout) else value


def _stored(path: Path, storages: dict[str, tuple[int, int]], layout: _Layout) -> Stored:
    """Return the tensor of a layout that fits its storage."""
    dtype = layout.storage.dtype
    start, size = storages.get(layout.storage.key, (0, -1))
    count, reach = math.prod(layout.shape), _reach(layout)
    if size < 0 or max(count, layout.offset + reach) * dtype.itemsize > size:
        raise ModelFolderError(
            f"{path}: a tensor of shape {list(layout.shape)} does not fit its storage {layout.storage.key!r}"
        )
    return Stored(layout.shape, dtype, partial(_cut, path, start, layout))


def _reach(layout: _Layout) -> int:
    """Return the elements from a tensor's first to its last."""
    if 0 in layout.shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(layout.shape, layout.stride, strict=True))


def _cut(path: Path, start: int, layout: _Layout) -> Tensor:
    """Read a tensor whose layout has been checked against its storage at byte `start` of the file."""
    dtype, reach = layout.storage.dtype, _reach(layout)
    if reach == 0:
        return torch.empty(layout.shape, dtype=dtype)
    with path.open("rb") as file:
        file.seek(start + layout.offset * dtype.itemsize)
        data = bytearray(file.read(reach * dtype.itemsize))
    if len(data) != reach * dtype.itemsize:
        raise ModelFolderError(f"{path} has become shorter while it was read")
    return torch.frombuffer(data, dtype=dtype).as_strided(layout.shape, layout.stride)
