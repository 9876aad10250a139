"""Text to token ids and back, over the `tokenizers` library.

The module also knows the bytes of every single token: what incremental decoding, log-probability keys and
bits per byte are made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers

from dape_engine.config import ModelConfig
from dape_engine.errors import ModelFolderError, RequestError
from dape_engine.files import check_regular, read_json, read_text
from dape_engine.long_text import LONGEST_PIECE, PIECE, can_cut, pieces

FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextTokenizer:
    """A model's tokenizer.

    Text that spells a special token is read as that token. Ids at and above the tokenizer's own vocabulary,
    which a padded model may draw, stand for no text.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, chat_template: str | None = None):
        self.chat_template = chat_template
        # A truncation or padding saved in the file would change prompts without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._bytes = _bytes_of_tokens(tokenizer)
        self._around = _around_text(tokenizer) if can_cut(tokenizer) else None
        self.bos_token_id = config.bos_token_id
        self.eos_token_id = config.eos_token_id

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> TextTokenizer:
        """Read `tokenizer.json`, and the chat template where there is one.

        Raises:
            ModelFolderError: a file is missing or damaged, or it holds ids that the model does not have.
        """
        path = folder / FILE
        if not path.exists():
            raise ModelFolderError(f"{folder} holds no {FILE}")
        check_regular(path)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelFolderError(f"cannot read {path}: {error}") from error
        loaded = cls(tokenizer, config, _chat_template(folder))
        if loaded.vocab_size > config.vocab_size:
            raise ModelFolderError(
                f"{path} holds {loaded.vocab_size} token ids, config.json has vocab_size {config.vocab_size}"
            )
        return loaded

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Return the token ids of a text; arguments and errors as of `encode_pieces`."""
        # Extended, not joined: copying millions of ids holds up every other thread.
        pieces_of_ids = self.encode_pieces(text, add_special_tokens=add_special_tokens, param=param)
        ids = next(pieces_of_ids)
        for more in pieces_of_ids:
            ids += more
        return ids

    def encode_pieces(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> Iterator[list[int]]:
        """Yield the token ids of a text, at least one piece of them; only long texts have several.

        Args:
            text: any text; the ids of special tokens spelled in it are used.
            add_special_tokens: whether to add what the tokenizer itself puts around a text, such as BOS.
            param: the request's field that holds the text, for the error.

        Raises:
            RequestError: the text holds a lone surrogate, so it has no UTF-8 form, or it is longer than
                `LONGEST_PIECE` and cannot be cut.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{param} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
                param=param,
            ) from error
        if len(text) <= PIECE or self._around is None:
            yield self._encode(text, add_special_tokens, param)
            return
        before, after = self._around if add_special_tokens else ([], [])
        ids = list(before)
        for piece in pieces(text):
            ids += self._encode(piece, False, param)
            yield ids
            ids = []
        yield list(after)

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        if len(text) > LONGEST_PIECE:
            raise RequestError(
                f"{param}: {len(text)} characters without a place where this tokenizer's text can be cut "
                f"are above the limit of {LONGEST_PIECE}",
                param=param,
            )
        # Unlike `encode`, the batch calls let other threads run meanwhile, the engine's among them.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        text: str
        (text,) = self._tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token_id: int) -> bool:
        """Return whether the id is a special token's, such as the end-of-text token's."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token adds to a text, in UTF-8; it may begin or end inside a character."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """Return one token as shown in log-probabilities.

        Bytes that are no complete characters are shown in OpenAI's form, such as `bytes:\\xe2\\x80`, and
        ids without text in vLLM's, such as `token_id:50300`, so that different tokens stay apart.
        """
        raw = self.token_bytes(token_id)
        if not raw:
            return f"token_id:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + raw.decode(errors="backslashreplace")

    def byte_length(self, ids: Sequence[int]) -> int:
        """Return the number of UTF-8 bytes that tokens stand for; special tokens stand for none."""
        return sum(len(self.token_bytes(token_id)) for token_id in ids if token_id not in self._special)


def _chat_template(folder: Path) -> str | None:
    """Return the folder's chat template, Jinja text: its own file goes before the tokenizer's settings."""
    own, settings = folder / CHAT_TEMPLATE_FILE, folder / SETTINGS_FILE
    if own.exists():
        return read_text(own)
    if not settings.exists():
        return None
    description = read_json(settings)
    try:
        template = description.get("chat_template")
        if isinstance(template, list):
            # Several, by name.
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (AttributeError, TypeError, KeyError) as error:
        raise ModelFolderError(f"cannot read the chat template in {folder}: {error}") from error
    if template is not None and not isinstance(template, str):
        raise ModelFolderError(f"{settings}: chat_template must be a text")
    return template


def _around_text(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer itself puts before and after a text."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    before = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
    return whole[:before], whole[before + len(plain) :]


def _bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of every token, by id."""
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        letters = _byte_letters()
        for token, token_id in vocabulary.items():
            # Added tokens may hold other characters; they stand for themselves.
            known = all(letter in letters for letter in token)
            table[token_id] = bytes(letters[letter] for letter in token) if known else token.encode()
    else:
        prefix = next((t for t in vocabulary.values() if tokenizer.decode([t]).isalnum()), None)
        for token, token_id in vocabulary.items():
            table[token_id] = _bytes_after(tokenizer, prefix, token, token_id)
    return table


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter of byte-level BPE: printable Latin-1 as it is, the rest from U+0100."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    moved = iter(sorted(letter for letter in alphabet if ord(letter) >= 256))
    return {printable.get(byte) or next(moved): byte for byte in range(256)}


def _bytes_after(tokenizer: Tokenizer, prefix: int | None, token: str, token_id: int) -> bytes:
    """Return what a token adds to a text that goes on, for tokenizers whose decoder is not byte-level."""
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    before = [] if prefix is None else [prefix]
    text: str = tokenizer.decode([*before, token_id], skip_special_tokens=False)
    return text[len(tokenizer.decode(before)) :].encode()
