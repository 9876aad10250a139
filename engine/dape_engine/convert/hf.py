"""`dape convert --from hf`: folders of Hugging Face's GPT-NeoX, BLOOM, MPT and GPT-2."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import ValidationError

from dape_engine.convert.assemble import Report, assemble
from dape_engine.convert.hf_families import FAMILIES, Family
from dape_engine.convert.pickles import read_pickle, tensors_of
from dape_engine.convert.result import ImportOptions, check_target, make_config, write_import
from dape_engine.convert.stored import Checkpoint, merge, read_safetensors, size_of
from dape_engine.convert.tokenizers import END_OF_TEXT, end_of_text, find_tokenizer
from dape_engine.errors import ModelFolderError
from dape_engine.tensors import WEIGHTS, WEIGHTS_INDEX, indexed_files

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def import_hf(source: Path, target: Path, options: ImportOptions, report: Report) -> None:
    """Write a model folder from a Hugging Face folder.

    Args:
        source: with config.json and safetensors weights, or pickled ones.
        target: of the model; new or empty.
        options: the user's choices.
        report: gets what became of every tensor, also when the import fails.

    Raises:
        ModelFolderError: the folder is damaged, or it is not a model that the engine runs.
    """
    check_target(target)
    if options.settings:
        raise ModelFolderError("--settings is for --from gpt-neox: a Hugging Face folder has its config.json")
    family = _family(source)
    tokenizer = find_tokenizer(options.tokenizer, (source,))
    checkpoint = _one_name(family, _checkpoint(source))
    rows = size_of(checkpoint, family.embeddings, 0)
    dtype = str(checkpoint[family.embeddings].dtype).removeprefix("torch.")
    settings = {**family.settings(), "vocab_size": rows, "dtype": dtype}
    config = make_config(settings, options)
    report.notes += [f"{family.model_type} of {source}", *family.notes()]
    if config.eos_token_id is None and end_of_text(tokenizer) is not None:
        config = config.model_copy(update={"eos_token_id": end_of_text(tokenizer)})
        report.notes.append(f"config.json names no end token: {END_OF_TEXT} of the tokenizer is used")
    model = assemble(config, checkpoint, family.rules(), family.ignored, report)
    _check_tied(family, checkpoint)
    write_import(target, model, tokenizer, report, options)


def _family(folder: Path) -> Family:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFolderError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelFolderError(f"{path} must hold settings by name")
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        raise ModelFolderError(
            f"{path}: model_type {kind!r} is not supported, expected one of {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES[kind].model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise ModelFolderError(f"{path}: {name}: {first['msg']}{given}") from error


def _checkpoint(folder: Path) -> Checkpoint:
    """Return the tensors of a folder; safetensors go before pickles."""
    for single, index, suffix in ((WEIGHTS, WEIGHTS_INDEX, ".safetensors"), (PICKLE, PICKLE_INDEX, ".bin")):
        if (folder / index).exists():
            files = indexed_files(folder / index, suffix)
        elif (folder / single).exists():
            files = [folder / single]
        else:
            continue
        if suffix == ".bin":
            return merge((path, tensors_of(read_pickle(path))) for path in files)
        return merge((path, read_safetensors(path)) for path in files)
    raise ModelFolderError(f"{folder} holds neither {WEIGHTS} nor {PICKLE}")


def _one_name(family: Family, checkpoint: Checkpoint) -> Checkpoint:
    """Drop the inner model's name, which not all files have, and give the output layer one name."""
    outputs = dict.fromkeys(family.outputs, family.outputs[0])
    names = {name: name.removeprefix(family.prefix) for name in checkpoint}
    return merge(
        (Path(name), {outputs.get(names[name], names[name]): tensor}) for name, tensor in checkpoint.items()
    )


def _check_tied(family: Family, checkpoint: Checkpoint) -> None:
    """Refuse an output layer of its own where the settings say that there is none."""
    name = family.outputs[0]
    if family.tie_word_embeddings and name in checkpoint:
        own, shared = checkpoint[name].read(), checkpoint[family.embeddings].read()
        if not torch.equal(own, shared):
            raise ModelFolderError(
                f"tensor {name} differs from {family.embeddings}, but tie_word_embeddings is true"
            )
