"""Settings of one training run, read from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dape_engine.config import ModelConfig
from dape_engine.files import read_settings

Positive = Annotated[int, Field(gt=0)]


class TrainingConfig(BaseModel):
    """Model, data and optimiser of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelConfig
    train_data: Path | list[Path]
    """JSON Lines (may be .xz) with a "text" field per document. One named twice counts twice."""
    valid_data: Path | list[Path]
    licenses: list[str] | None = None
    """Train on those documents only whose "license" field is one of these; by default on all."""
    data_note: str = ""
    """Where the text comes from and its licence, for the model card."""
    license: str = "Apache-2.0"
    """Of the trained weights."""
    initial_weights: Path | None = None
    """A model folder with the sizes of `model`, whose weights the run begins with; by default random ones."""
    tokenizer: Path | None = None
    """A tokenizer.json; by default one is trained on the training text and kept in the run folder."""
    batch_size: Positive = 32
    """Sequences of `model.train_length` tokens per step, over all processes."""
    steps: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    min_learning_rate: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["bf16", "no"] = "bf16"
    """Autocast precision of the matrix products; parameters and optimiser stay fp32."""
    threads: Positive | None = None
    """CPU threads; by default torch's choice."""
    validate_every: Positive = 250
    checkpoint_every: Positive = 100
    seed: int = 0


def load_training_config(path: Path, overrides: dict[str, object]) -> TrainingConfig:
    """Read a YAML file and replace top-level settings by those given.

    Raises:
        SettingsError: the file does not hold settings.
        pydantic.ValidationError: a setting is unknown, missing or out of range.
    """
    settings = read_settings(path)
    return TrainingConfig.model_validate({**settings, **overrides})
