"""The reader of pickled checkpoints builds tensors and plain containers, whatever a pickle asks for."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dape_engine.convert.pickles import read_pickle, tensors_of
from dape_engine.convert.stored import Stored
from dape_engine.errors import ModelFolderError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


def write(path: Path, program: bytes, **files: bytes) -> Path:
    """A file of torch.save with a pickle of our own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        for name, data in files.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", data)
    return path


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that would exist if code of a pickle had run."""
    return tmp_path / "mark"


class Calls:
    """Pickled, it calls a function with arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def test_tensors_of_every_dtype_and_layout(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        **{str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES},
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "bool": torch.tensor([True, False]),
    }
    torch.save(saved, tmp_path / "x.pt")
    found = tensors_of(read_pickle(tmp_path / "x.pt"))
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(found[name].read(), tensor)


def test_state_dictionaries_and_what_training_leaves_beside_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    content = {
        "module": model.state_dict(),  # with metadata of its own
        "np_rng_state": np.random.RandomState(0).get_state(),
        "rng": torch.get_rng_state(),
        "args": argparse.Namespace(heads=3, dtype=torch.float16, device=torch.device("cpu")),
        "names": {"a", "b"},
        "shapes": [OrderedDict(a=torch.Size([1, 2]))],
        "steps": 10,
        "scale": np.float64(2.0),
    }
    torch.save(content, tmp_path / "x.pt")
    found = read_pickle(tmp_path / "x.pt")
    assert found["steps"] == 10
    assert torch.equal(found["module"]["0.weight"].read(), model[0].weight)
    assert isinstance(found["rng"], Stored)
    assert type(found["args"]).__name__ == "_Unread"
    assert not hasattr(found["args"], "heads")


ATTACKS: dict[str, Callable[[str], Any]] = {
    "system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({mark!r}, 'w')"),
    "open": lambda mark: Calls(open, mark, "w"),
    "getattr": lambda _: Calls(getattr, "x", "upper"),
    "import": lambda _: Calls(__import__, "antigravity"),
    "nested load": lambda mark: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {mark}"))),
    "torch.load": lambda mark: Calls(torch.load, mark),
    "torch.hub": lambda _: Calls(torch.hub.load, "a", "b"),
    "module": lambda _: nn.Linear(2, 2),
    "in a set": lambda mark: {Calls(os.system, f"touch {mark}")},
    "in a key": lambda mark: OrderedDict([((Calls(os.system, f"touch {mark}"),), 1)]),
    "beside tensors": lambda mark: {"a": torch.ones(2), "b": Calls(os.system, f"touch {mark}")},
    "state": lambda mark: {"a": Calls(OrderedDict, state=Calls(os.system, f"touch {mark}"))},
    "in skipped state": lambda mark: argparse.Namespace(a=Calls(os.system, f"touch {mark}")),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_that_a_pickle_calls_runs(name: str, protocol: int, tmp_path: Path, mark: Path) -> None:
    torch.save({"x": ATTACKS[name](str(mark))}, tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(ModelFolderError, match="which is no part of a tensor") as caught:
        read_pickle(tmp_path / "x.pt")
    assert not mark.exists()
    assert "\n" not in caught.value.message


def test_the_attacks_are_real(tmp_path: Path, mark: Path) -> None:
    torch.save({"x": ATTACKS["system"](str(mark))}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert mark.exists()


PROGRAMS = {
    "the old way to make objects": (b"(cos\nsystem\nS'true'\no.", "instruction OBJ"),
    "the oldest": (b"(S'true'\nios\nsystem\n.", "instruction INST"),
    "registered extensions": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "names put together": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "posix.system"),
    "names with dots": (b"\x80\x04\x8c\x08builtins\x8c\x0btuple.mro()\x93.", "no part of a tensor"),
    "a class of Python's through a dotted name": (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93\x8c\x01a\x85R.",
        "no part of a tensor",
    ),
    "a change of our own objects": (
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
        "not its own",
    ),
    "a change of their class": (
        b"\x80\x02ctorch\nFloatStorage\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        "not its own",
    ),
    "a place that takes all memory": (b"\x80\x02}r\xff\xff\xff\x7f.", "numbers an object 2147483647"),
    "a text longer than the file": (b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00.", "not read"),
    "nothing at all": (b"", "not read"),
    "no end": (b"\x80\x02}", "not read"),
    "a list": (b"\x80\x02].", "holds a list, expected tensors by name"),
    "a storage of its own kind": (
        b"\x80\x02(X\x07\x00\x00\x00storageK\x01X\x01\x00\x00\x000tQ.",
        "storage wrongly",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_no_checkpoint_holds(name: str, tmp_path: Path) -> None:
    program, message = PROGRAMS[name]
    with pytest.raises(ModelFolderError, match=message):
        read_pickle(write(tmp_path / "x.pt", program))


def described(shape: tuple[Any, ...], stride: tuple[Any, ...], offset: Any, key: str = "0") -> bytes:
    """A pickle of one float32 tensor."""

    storage = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", 4) if obj is storage else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump(
        {"x": Calls(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, {})}
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    "layout",
    [
        ((5,), (1,), 0),
        ((2, 2), (3, 1), 0),
        ((4,), (1,), 1),
        ((1 << 40,), (0,), 0),  # a small storage seen very often
        ((-1,), (1,), 0),
        ((2,), (1, 1), 0),
        ((2,), (-1,), 3),
        ((2.0,), (1,), 0),
        ((2,), (1,), "0"),
        ((2,), (1,), 0, "missing"),
    ],
)
def test_layouts_that_leave_their_storage(layout: Any, tmp_path: Path) -> None:
    data = struct.pack("<4f", 1, 2, 3, 4)
    good = tensors_of(read_pickle(write(tmp_path / "good.pt", described((2, 2), (1, 2), 0), _0=data)))
    assert good["x"].read().tolist() == [[1, 3], [2, 4]]
    with pytest.raises(ModelFolderError, match=r"does not fit its storage|describes a tensor wrongly"):
        read_pickle(write(tmp_path / "x.pt", described(*layout), _0=data))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(9)}, path)
    whole = path.read_bytes()
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for content in (b"", b"no", whole[: len(whole) // 2], (tmp_path / "old.pt").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ModelFolderError, match=r"is damaged, or older than PyTorch 1\.6"):
            read_pickle(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(ModelFolderError, match=r"holds no data\.pkl"):
        read_pickle(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", described((2,), (1,), 0))
        archive.writestr("a/data/0", bytes(1000))
    with pytest.raises(ModelFolderError, match="is compressed"):
        read_pickle(path)
    with pytest.raises(ModelFolderError, match=r"cannot read .*: No such file"):
        read_pickle(tmp_path / "missing.pt")


def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Bytes of a pickle replaced at random: the reader answers with tensors or with its own error."""
    path = tmp_path / "x.pt"
    program = described((2, 2), (2, 1), 0)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bent = bytearray(program)
        for place in random.integers(0, len(bent), 2):
            bent[place] = random.integers(0, 256)
        write(path, bytes(bent), _0=bytes(16))
        try:
            read_pickle(path)
        except ModelFolderError:
            refused += 1
    assert refused > 100
