"""Several runs from one file: which there are, in what order, and how far each is.

A sweep is a base configuration, data sets, and named runs that replace settings of its model. A pass takes
the runs in the order of the file, each on every data set of its own; the first pass trains first seeds, the
next ones further seeds of the runs that have them. So a sweep that is cut short holds the most important
runs, whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dape_engine.errors import SettingsError
from dape_engine.files import read_settings
from dape_training.config import TrainingConfig
from dape_training.files import write_json
from dape_training.run_folder import RESULT, last_progress

SETTINGS = "settings.json"
# These may change between two processes of one run, or say where a machine keeps its files.
NOT_PART_OF_A_RUN = frozenset({"train_data", "valid_data", "threads", "checkpoint_every"})
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class DataSet(BaseModel):
    """The texts of one data set; relative paths start at the folder that the user names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train_data: Path
    valid_data: Path


class SweepRun(BaseModel):
    """One named run: how its model differs from the base."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    label: str
    """In tables and plots."""
    model: dict[str, Any] = {}
    """Settings that replace those of the base model; nested ones replace theirs one by one."""
    seeds: Annotated[list[int], Field(min_length=1)] = [1]
    datasets: Annotated[list[Name], Field(min_length=1)] | None = None
    """The data sets it is trained on; by default all."""
    static: Name | None = None
    """For a DAPE run: the run it is compared with."""


class Sweep(BaseModel):
    """A sweep file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: dict[str, Any]
    """A training configuration without data and seed."""
    datasets: Annotated[dict[Name, DataSet], Field(min_length=1)]
    runs: Annotated[dict[Name, SweepRun], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_exist(self) -> Sweep:
        for name, run in self.runs.items():
            if run.static is not None and run.static not in self.runs:
                raise ValueError(f"runs.{name}.static: there is no run {run.static!r}")
            for dataset in run.datasets or ():
                if dataset not in self.datasets:
                    raise ValueError(f"runs.{name}.datasets: there is no data set {dataset!r}")
            if len(set(run.seeds)) < len(run.seeds):
                raise ValueError(f"runs.{name}.seeds: {run.seeds} holds a seed twice")
        return self


@dataclass(frozen=True, slots=True)
class Job:
    """One run with one seed on one data set, and the folder that is its own."""

    dataset: str
    run: str
    seed: int
    folder: Path
    config: TrainingConfig

    @property
    def name(self) -> str:
        """Data set, run and seed."""
        return f"{self.dataset}/{self.run}/seed-{self.seed}"

    @property
    def shared(self) -> Path:
        """The folder of the tokenizer and tokens of the data set."""
        return self.folder.parent.parent / "data"

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the model folder is complete."""
        return (self.folder / RESULT).exists()

    @property
    def result(self) -> dict[str, Any]:
        """What a finished run reports of itself."""
        result: dict[str, Any] = json.loads((self.folder / RESULT).read_text())
        return result

    @property
    def share_done(self) -> float:
        """Steps done of all steps, 0 to 1."""
        return 1.0 if self.finished else min(1.0, last_progress(self.folder).step / self.config.steps)

    def begin(self) -> None:
        """Make the folder and note the settings in it."""
        write_json(self.folder / SETTINGS, self._settings)

    def check(self) -> None:
        """Check that the folder, if it is there, was begun with these settings.

        Raises:
            SettingsError: the folder holds a run with other settings.
        """
        path = self.folder / SETTINGS
        if not path.exists():
            return
        own, begun = self._settings, json.loads(path.read_text())
        for name in sorted(own.keys() | begun.keys()):
            if own.get(name) != begun.get(name):
                raise SettingsError(
                    f"{self.folder} holds a run with other settings: {name} was {begun.get(name)}, "
                    f"now it is {own.get(name)}; choose another --out or remove the folder"
                )

    @property
    def _settings(self) -> dict[str, Any]:
        # Only what was set: a later version may know more settings, with defaults.
        return self.config.model_dump(mode="json", exclude_unset=True, exclude=set(NOT_PART_OF_A_RUN))


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        SettingsError: the file does not hold settings.
        pydantic.ValidationError: a setting is unknown, missing or out of range.
    """
    settings = read_settings(path)
    return Sweep.model_validate(settings)


def plan(sweep: Sweep, out: Path, corpus: Path, overrides: dict[str, Any]) -> list[Job]:
    """Return all jobs, the most important first.

    Args:
        sweep: the file.
        out: the folder of all results.
        corpus: where relative paths of data sets start.
        overrides: settings that replace those of the base.

    Raises:
        pydantic.ValidationError: the settings of a run are wrong.
    """
    base = {**sweep.base, **overrides}
    passes = max(len(run.seeds) for run in sweep.runs.values())
    return [
        Job(
            dataset,
            name,
            run.seeds[number],
            out / dataset / name / f"seed-{run.seeds[number]}",
            TrainingConfig.model_validate(
                {
                    **base,
                    "model": _merged(base.get("model", {}), run.model),
                    "train_data": corpus / data.train_data,
                    "valid_data": corpus / data.valid_data,
                    "seed": run.seeds[number],
                }
            ),
        )
        for number in range(passes)
        for name, run in sweep.runs.items()
        if number < len(run.seeds)
        for dataset, data in sweep.datasets.items()
        if run.datasets is None or dataset in run.datasets
    ]


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged
