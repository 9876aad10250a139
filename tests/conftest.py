"""Options and fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dape_kernels.attention import BACKENDS, Backend
from golden import Golden

REPOSITORY = Path(__file__).parents[1]
# A larger set may lie beside the repository.
GOLDEN_FOLDERS = (REPOSITORY / "tests/data/golden", REPOSITORY.parent / "shared/golden")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        metavar="DIR",
        help="folder of golden .safetensors files to test against instead of the default ones; repeatable",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        given: list[Path] | None = metafunc.config.getoption("--golden")
        paths = [path for folder in given or GOLDEN_FOLDERS for path in sorted(folder.glob("*.safetensors"))]
        if not paths:
            raise pytest.UsageError(f"no .safetensors files in {', '.join(map(str, given or GOLDEN_FOLDERS))}")
        unique = {path.stem if given else path.name: path for path in paths}
        metafunc.parametrize("golden", unique.values(), ids=list(unique), indirect=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """One golden file; a test that asks for it runs once per file."""
    return Golden.load(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend[Any]:
    """Every attention backend of this machine in turn."""
    return BACKENDS[request.param]
