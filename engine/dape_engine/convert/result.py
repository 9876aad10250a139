"""What every importer needs besides its format: the user's choices, and the model folder that is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from tokenizers import Tokenizer

from dape_engine.config import ModelConfig
from dape_engine.convert.assemble import Report, check_report
from dape_engine.errors import ModelFolderError
from dape_engine.model import DapeForCausalLM
from dape_engine.weights import save_model_folder


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the user may choose about an import."""

    settings: tuple[Path, ...] = ()
    """Training settings; by default those found beside the checkpoint."""
    tokenizer: Path | None = None
    """A tokenizer's file or folder; by default the one found beside the checkpoint."""
    dtype: str | None = None
    """Of the weights written; by default that of the checkpoint."""
    max_model_len: int | None = None
    """Tokens; by default the length that the checkpoint names."""
    allow_missing: bool = False
    allow_unused: bool = False


def make_config(settings: dict[str, Any], options: ImportOptions) -> ModelConfig:
    """Return the settings of the model to be written.

    Raises:
        ModelFolderError: the engine does not run such a model.
    """
    if options.dtype is not None:
        settings = {**settings, "dtype": options.dtype}
    if options.max_model_len is not None:
        settings = {**settings, "max_model_len": options.max_model_len}
    try:
        return ModelConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        given = f", got {first['input']!r}" if field else ""
        raise ModelFolderError(
            f"the engine cannot run this model: {field + ': ' if field else ''}{first['msg']}{given}"
        ) from error


def check_target(folder: Path) -> None:
    """Refuse to write where something lies.

    Raises:
        ModelFolderError: the folder exists and is not empty, or is no folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ModelFolderError(f"{folder} exists already and is not an empty folder")


def write_import(
    folder: Path, model: DapeForCausalLM, tokenizer: Tokenizer, report: Report, options: ImportOptions
) -> None:
    """Write the model folder if the report is in order.

    Raises:
        ModelFolderError: see `check_report`; the tokenizer has more tokens than the model; no room to write.
    """
    check_report(report, allow_missing=options.allow_missing, allow_unused=options.allow_unused)
    known = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if known > model.config.vocab_size:
        raise ModelFolderError(
            f"the tokenizer has {known} ids, the checkpoint {model.config.vocab_size} embeddings"
        )
    if known < model.config.vocab_size:
        report.notes.append(
            f"{model.config.vocab_size - known} embeddings are padding: no token has their ids"
        )
    try:
        save_model_folder(folder, model, tokenizer)
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(f"cannot write {folder}: {error}") from error
