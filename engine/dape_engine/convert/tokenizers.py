"""`tokenizer.json` out of what checkpoints carry: itself, NeoX's file, or GPT-2's vocabulary and merges."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dape_engine.errors import ModelFolderError

WHOLE = ("tokenizer.json", "20B_tokenizer.json")
PAIRS = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"))
END_OF_TEXT = "<|endoftext|>"


def find_tokenizer(
    given: Path | None, folders: Iterable[Path], named: tuple[str | None, str | None] = (None, None)
) -> Tokenizer:
    """Return the tokenizer of a checkpoint.

    Args:
        given: a tokenizer's file or folder, which goes before all else; of GPT-2's pair, the vocabulary.
        folders: where to look.
        named: names of the files, as training settings have them; their folders are of no importance here.

    Raises:
        ModelFolderError: there is none, or it is damaged.
    """
    if given is not None and given.is_file():
        return _read(given, _merges_beside(given))
    places = list(folders) if given is None else [given]
    vocabulary, merges = (Path(name).name if name else None for name in named)
    whole = [*([vocabulary] if vocabulary and not merges else []), *WHOLE]
    pairs = [*([(vocabulary, merges)] if vocabulary and merges else []), *PAIRS]
    for place in places:
        for name in whole:
            if (place / name).is_file():
                return _read(place / name, None)
        for first, second in pairs:
            if (place / first).is_file() and (place / second).is_file():
                return _read(place / first, place / second)
    shown = ", ".join([*whole, *(f"{first} with {second}" for first, second in pairs)])
    raise ModelFolderError(
        f"no tokenizer in {', '.join(map(str, places))} ({shown}): give one with --tokenizer"
    )


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token between documents, None where the tokenizer has none of that name."""
    token: int | None = tokenizer.token_to_id(END_OF_TEXT)
    return token


def _merges_beside(vocabulary: Path) -> Path | None:
    """Return the merges that belong to a vocabulary file, None for a whole tokenizer."""
    for first, second in PAIRS:
        if vocabulary.name == first:
            return vocabulary.with_name(second)
    return None


def _read(path: Path, merges: Path | None) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path)) if merges is None else _byte_level(path, merges)
    except Exception as error:  # the library raises nothing narrower
        raise ModelFolderError(f"cannot read the tokenizer {path}: {' '.join(str(error).split())}") from error


def _byte_level(vocabulary: Path, merges: Path) -> Tokenizer:
    """Return GPT-2's byte-level BPE (Radford et al. 2019)."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer
