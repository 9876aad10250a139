"""Options and fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dape_kernels.attention import BACKENDS, Backend
from golden import Golden

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


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend[Any]:
    """Every attention backend of this machine in turn."""
    return BACKENDS[request.param]
