"""Objectives: what a run must reach, read from YAML and compared with its figures.

streaming:                          # the phase
  stream.failed: {at_most: 0}       # kind of request, then the figure
  stream.itl_ms.p99: {at_most: 300}
  extra.leaked_blocks: {at_most: 0}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dape_engine.errors import SettingsError
from dape_engine.files import read_settings


class Bound(BaseModel):
    """The range of one figure."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    at_most: float | None = None
    at_least: float | None = None


Objectives = dict[str, dict[str, Bound]]
"""Bounds by phase and figure."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One objective and what came of it."""

    figure: str
    bound: Bound
    value: float | None
    """None: it was not measured, which breaks the objective."""

    @property
    def met(self) -> bool:
        """Whether the value was measured and lies in the range."""
        if self.value is None:
            return False
        low, high = self.bound.at_least, self.bound.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def __str__(self) -> str:
        limits = {"at most": self.bound.at_most, "at least": self.bound.at_least}
        wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{'met' if self.met else 'BROKEN'}: {self.figure} is {value}, wanted {wanted}"


def load_objectives(path: Path) -> Objectives:
    """Read a file of objectives.

    Raises:
        SettingsError: it cannot be read, or holds something else.
    """
    try:
        return TypeAdapter(Objectives).validate_python(read_settings(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(
            f"--objectives {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def judge(bounds: Mapping[str, Bound], figures: Mapping[str, Any]) -> list[Verdict]:
    """Compare the figures of one phase with its objectives."""
    return [Verdict(name, bound, _value(figures, name)) for name, bound in bounds.items()]


def _value(figures: Mapping[str, Any], name: str) -> float | None:
    found: Any = figures
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return None if found is None else float(found)
