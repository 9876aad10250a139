"""Settings of a CHE sweep, read from a YAML file, and the runs that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dape_engine.config import MAX_HEADS, DapeConfig, PositionConfig
from dape_engine.files import read_settings
from dape_training.che.model import Setup
from dape_training.che.tasks import TASKS

Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_.-]+$")]


class EncodingSettings(BaseModel):
    """One column of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    position: PositionConfig
    dape: DapeConfig | None = None

    @model_validator(mode="after")
    def _acts_on_single_pairs(self) -> Self:
        if self.dape is not None and self.dape.kernel != 1:
            raise ValueError(f"dape.kernel must be 1 for CHE models, got {self.dape.kernel}")
        if self.position.kind in ("cope", "learned"):
            raise ValueError(f"position.kind {self.position.kind!r} cannot be used for CHE models")
        return self


class RunSettings(BaseModel):
    """Model, optimiser and test; the defaults are the published set-up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Positive = 5
    heads: Annotated[int, Field(gt=0, le=MAX_HEADS)] = 8
    hidden: Positive = 256
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    steps: Positive = 200_000
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of Adam, the same at every step."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    train_up_to: Positive = 40
    """Training lengths are uniform in 1 to this."""
    test_lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = tuple(range(1, 501))
    """The score is the mean over those above `train_up_to`."""
    test_samples: Positive = 512
    """Strings per test length."""
    test_pairs: Positive | None = None
    """Where given, fewer strings of long inputs: at most this many pairs of query and key per test length."""
    max_position: Positive | None = None
    """Where given, positions are drawn below it, ascending, anew for every batch (Ruoss et al. 2023)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if max(self.test_lengths) <= self.train_up_to:
            raise ValueError(f"test_lengths holds nothing above train_up_to {self.train_up_to}")
        if self.max_position is not None and self.max_position < self.longest:
            raise ValueError(
                f"max_position {self.max_position} is below {self.longest}, the tokens of the longest "
                "input and its answer"
            )
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest input with the longest answer, which is twice as long (Duplicate String)."""
        return 3 * max(self.train_up_to, *self.test_lengths)


class Run(BaseModel):
    """One model of the sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    encoding_name: Name
    encoding: EncodingSettings
    setup: Setup
    seed: int
    settings: RunSettings

    @property
    def folder(self) -> Path:
        """Where its files lie below the sweep's folder."""
        return Path(self.setup) / self.task / f"{self.encoding_name}-seed{self.seed}"

    def trains_as(self, other: Run) -> bool:
        """Return whether another run leads to the same weights: the two may differ in their tests."""
        tests = {"test_lengths": (), "test_samples": 0, "test_pairs": None}
        mine, others = (
            run.model_copy(update={"settings": run.settings.model_copy(update=tests)})
            for run in (self, other)
        )
        return mine == others


class CheConfig(BaseModel):
    """A sweep over set-ups, seeds, encodings and tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    note: str = ""
    """What the budget is, for the report."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(TASKS)
    encodings: Annotated[dict[Name, EncodingSettings], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    setups: Annotated[tuple[Setup, ...], Field(min_length=1)] = ("bidirectional",)
    run: RunSettings = RunSettings()

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
        return tasks

    def runs(self) -> list[Run]:
        """Return the runs by importance: one seed of one encoding on every task before the next encoding."""
        return [
            Run(task=task, encoding_name=name, encoding=encoding, setup=setup, seed=seed, settings=self.run)
            for setup in self.setups
            for seed in self.seeds
            for name, encoding in self.encodings.items()
            for task in self.tasks
        ]


def load_che_config(path: Path, chosen: dict[str, Any], training: dict[str, Any]) -> CheConfig:
    """Read a sweep file.

    Args:
        path: of the file.
        chosen: replaces the file's `tasks`, `seeds` or `setups`; `encodings` are names to keep of the file's.
        training: replaces settings below `run`.

    Raises:
        SettingsError: the file does not hold settings.
        ValueError: an encoding is not in it.
        pydantic.ValidationError: a setting is unknown, missing or out of range.
    """
    settings = read_settings(path)
    run = {**(settings.get("run") or {}), **training}
    config = CheConfig.model_validate(
        {**settings, "run": run, **chosen, "encodings": settings.get("encodings")}
    )
    names = chosen.get("encodings", config.encodings)
    for name in names:
        if name not in config.encodings:
            raise ValueError(f"unknown encoding {name!r}, expected one of {', '.join(config.encodings)}")
    return config.model_copy(update={"encodings": {name: config.encodings[name] for name in names}})
