"""Documents, the tokenizer trained on them, and batches of equal windows."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from dape_training.files import whole_file

END_OF_TEXT = "<|endoftext|>"
SEGMENT_ENDS = frozenset("\n.?!")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """JSON Lines files, and which of their documents count."""

    files: tuple[Path, ...]
    licenses: tuple[str, ...] | None = None
    """Of the documents that count; None for all."""

    @classmethod
    def of(cls, files: Path | Iterable[Path], licenses: Iterable[str] | None = None) -> Corpus:
        """Return the corpus of one file or of several."""
        paths = (files,) if isinstance(files, Path) else tuple(files)
        return cls(paths, None if licenses is None else tuple(licenses))

    def documents(self) -> list[str]:
        """Return the text of every document that counts.

        Raises:
            ValueError: a licence that no document has, which is a slip of the pen.
        """
        if self.licenses is None:
            return [text for path in self.files for text in read_documents(path)]
        lines = [line for path in self.files for line in _lines(path)]
        unknown = set(self.licenses) - {line.get("license") for line in lines}
        if unknown:
            raise ValueError(f"licenses: no document has {', '.join(map(repr, sorted(unknown)))}")
        return [line["text"] for line in lines if line.get("license") in self.licenses]

    def key(self) -> bytes:
        """Return what tells this corpus from others."""
        licenses = b"" if self.licenses is None else json.dumps(self.licenses).encode()
        return b"".join(path.read_bytes() for path in self.files) + licenses


def read_documents(path: Path) -> list[str]:
    """Return the "text" of every line of a JSON Lines file, compressed by xz or not."""
    return [line["text"] for line in _lines(path)]


def _lines(path: Path) -> list[dict[str, Any]]:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer: any text round-trips, token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def segment_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end a segment of BiPE: they hold a newline or end a sentence or the text."""
    texts = {token: tokenizer.decode([token]) for token in tokenizer.get_vocab().values()}
    end = tokenizer.token_to_id(END_OF_TEXT)
    return tuple(sorted(t for t, text in texts.items() if t == end or set(text) & SEGMENT_ENDS))


def tokenize_documents(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Return one int32 array: every document followed by the end-of-text token, in order."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, end], dtype=np.int32) for e in encoded])


def saved_tokenizer(data: Corpus, vocab_size: int, folder: Path) -> Tokenizer:
    """Return the tokenizer.json of a folder, trained on the documents of `data` if it is not there yet."""
    saved = folder / "tokenizer.json"
    if not saved.exists():
        documents = data.documents()
        logger.info("training the tokenizer on %d documents", len(documents))
        with whole_file(saved) as new:
            train_tokenizer(documents, vocab_size).save(str(new))
    return Tokenizer.from_file(str(saved))


def saved_tokens(data: Corpus, tokenizer: Tokenizer, folder: Path) -> np.ndarray:
    """Return `tokenize_documents` of a corpus, kept in a folder under a name made from text and tokenizer."""
    key = hashlib.sha256(data.key() + tokenizer.to_str().encode()).hexdigest()[:16]
    saved = folder / f"tokens-{key}.npy"
    if not saved.exists():
        logger.info("tokenizing %s", ", ".join(map(str, data.files)))
        with whole_file(saved) as new, new.open("wb") as file:
            np.save(file, tokenize_documents(data.documents(), tokenizer))
    tokens: np.ndarray = np.load(saved, mmap_mode="r")
    return tokens


def training_batches(
    tokens: np.ndarray, length: int, batch_size: int, seed: int, first_step: int = 0
) -> Iterator[Tensor]:
    """Yield int64 batches [batch_size, length + 1] without end, the same for the same seed and step.

    Each epoch cuts the text at another offset and visits its windows in another order.
    """
    per_epoch = (len(tokens) - length) // length // batch_size
    step = first_step
    while True:
        epoch, within = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(length))
        starts = rng.permutation((len(tokens) - 1 - offset) // length)[: per_epoch * batch_size]
        for first in range(within * batch_size, len(starts) - batch_size + 1, batch_size):
            rows = starts[first : first + batch_size] * length + offset
            yield torch.from_numpy(np.stack([tokens[r : r + length + 1] for r in rows]).astype(np.int64))
            step += 1


def validation_batches(tokens: np.ndarray, length: int, batch_size: int, batches: int) -> list[Tensor]:
    """Return up to `batches` batches [batch_size, length + 1] spread evenly over the text."""
    windows = (len(tokens) - 1) // length
    chosen = np.linspace(0, windows - 1, min(batches * batch_size, windows), dtype=np.int64)
    rows = [torch.from_numpy(tokens[w * length : (w + 1) * length + 1].astype(np.int64)) for w in chosen]
    return list(torch.split(torch.stack(rows), batch_size))
