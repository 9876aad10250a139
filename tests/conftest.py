"""Options and fixtures that several test files share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dape_kernels.attention import BACKENDS
from dape_kernels.backend import Backend
from dape_kernels.cpu.library import (
    BUILDS,
    LibraryMissingError,
    instruction_set,
    load,
    set_instruction_set,
)
from dape_kernels.triton import TritonBackend
from golden import Golden

# Before anything imports Triton: where there is no GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

REPOSITORY = Path(__file__).parents[1]
# A larger set may lie beside the repository; a small one is part of it.
GOLDEN_FOLDERS = (REPOSITORY.parent / "shared/golden", REPOSITORY / "tests/data/golden")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        metavar="DIR",
        help="folder of golden .safetensors files to test against; repeatable",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" not in metafunc.fixturenames:
        return
    folders = metafunc.config.getoption("--golden") or [next(filter(Path.is_dir, GOLDEN_FOLDERS))]
    paths = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    if not paths:
        raise pytest.UsageError(f"no .safetensors files in {', '.join(map(str, folders))}")
    metafunc.parametrize("golden", paths, ids=[path.stem for path in paths], indirect=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """One golden file; a test that asks for it runs once per file."""
    return Golden.load(request.param)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what `dape serve` does to the logging of its process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.handlers += [handler for handler in handlers if handler not in root.handlers]
    root.setLevel(level)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that what is read before it is written cannot go unnoticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


CPU = [f"cpu-{name}" for name in BUILDS]


@contextmanager
def backend_named(name: str) -> Iterator[Backend[Any]]:
    """The backend of a test id; a test of what this machine lacks is skipped."""
    key, _, wanted = name.partition("-")
    if key == "triton":
        backend = TritonBackend(interpreted=not torch.cuda.is_available())
        if (missing := backend.missing()) is not None:
            pytest.skip(missing)
        yield backend
        return
    if not wanted:
        yield BACKENDS[key]
        return
    try:
        before = instruction_set()
        set_instruction_set(wanted)
    except (LibraryMissingError, ValueError) as error:
        pytest.skip(str(error))
    yield BACKENDS[key]
    set_instruction_set(before)


@pytest.fixture(params=CPU)
def cpu(request: pytest.FixtureRequest) -> Iterator[Backend[Any]]:
    """The backend `cpu` with every build that this machine can run in turn."""
    with backend_named(request.param) as backend:
        yield backend


@pytest.fixture
def best_cpu() -> Backend[Any]:
    """The backend `cpu` with the instruction set that this machine would choose."""
    try:
        load()
    except LibraryMissingError as error:
        pytest.skip(str(error))
    return BACKENDS["cpu"]


@pytest.fixture
def triton() -> Iterator[Backend[Any]]:
    """The backend `triton`, interpreted where there is no GPU."""
    with backend_named("triton") as backend:
        yield backend


@pytest.fixture(params=[*CPU, *(name for name in BACKENDS if name not in ("cpu", "xformers"))])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend[Any]]:
    """Every attention backend of this machine in turn."""
    with backend_named(request.param) as backend:
        yield backend
