"""Text survives the way to tokens and back, token by token and whatever the tokens are."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dape_engine.config import ModelConfig, PositionConfig
from dape_engine.detokenizer import IncrementalDetokenizer, OutputText, StopChecker, TextPiece
from dape_engine.errors import ModelFolderError, RequestError
from dape_engine.request import SamplingParams
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import SHIPPED, load_config

END = "<|endoftext|>"
ADDED = "<été now>"
TEXT = "the quick brown fox — über naïve 日本語 and the lazy dog 🙂🙂 the end. " * 3

thorough = settings(derandomize=True, deadline=None, max_examples=150)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def byte_level() -> Tokenizer:
    """Return a small byte-level BPE tokenizer with a special token and an added one that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken(ADDED)])
    return tokenizer


def config(vocab_size: int = 320) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        train_length=8,
        max_model_len=8,
        bos_token_id=0,
        eos_token_id=0,
        position=PositionConfig(kind="nope"),
    )


TOKENIZER = TextTokenizer(byte_level(), config())
ids = st.integers(0, TOKENIZER.vocab_size - 1)


def token_of(raw: bytes) -> int:
    return next(token for token in range(1, TOKENIZER.vocab_size) if TOKENIZER.token_bytes(token) == raw)


SMILE = [token_of(bytes([byte])) for byte in "🙂".encode()]


@given(any_text)
@thorough
def test_any_text_comes_back(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    special = END in text
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == text
    assert special or TOKENIZER.byte_length(tokens) == len(text.encode())


def test_special_tokens_spelled_in_a_text_are_those_tokens() -> None:
    tokens = TOKENIZER.encode(f"{END}the{END}", add_special_tokens=False)
    assert (tokens[0], tokens[-1]) == (0, 0)
    assert TOKENIZER.decode(tokens) == "the"
    assert TOKENIZER.byte_length(tokens) == 3
    assert TOKENIZER.is_special(0)
    assert not TOKENIZER.is_special(tokens[1])
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 0)


def test_an_added_token_that_is_not_special_is_text() -> None:
    tokens = TOKENIZER.encode(f"a{ADDED}b")
    assert TOKENIZER.decode(tokens) == f"a{ADDED}b"
    assert TOKENIZER.byte_length(tokens) == len(f"a{ADDED}b".encode())


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "\udc80" * 3])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"input holds the lone surrogate U\+D") as caught:
        TOKENIZER.encode(text, param="input")
    assert caught.value.param == "input"


def test_single_tokens_are_shown_so_that_they_stay_apart() -> None:
    assert TOKENIZER.token_text(token_of(b"the")) == "the"
    assert TOKENIZER.token_text(0) == END
    assert TOKENIZER.token_text(SMILE[0]) == r"bytes:\xf0"
    assert TOKENIZER.token_text(TOKENIZER.vocab_size) == f"token_id:{TOKENIZER.vocab_size}"
    shown = [TOKENIZER.token_text(token) for token in range(TOKENIZER.vocab_size + 5)]
    assert len(set(shown)) == len(shown)


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_model_folder_gives_its_tokenizer(tmp_path: Path) -> None:
    loaded = TextTokenizer.load(save(tmp_path, byte_level()), config(TOKENIZER.vocab_size))
    assert loaded.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert loaded.vocab_size == TOKENIZER.vocab_size


def test_a_saved_truncation_or_padding_changes_no_prompt(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=500)
    assert TextTokenizer.load(save(tmp_path, tokenizer), config()).encode(TEXT) == TOKENIZER.encode(TEXT)


def test_bad_model_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"holds no tokenizer\.json"):
        TextTokenizer.load(tmp_path, config())
    save(tmp_path, byte_level())
    with pytest.raises(ModelFolderError, match="has vocab_size 300"):
        TextTokenizer.load(tmp_path, config(300))
    for damaged in ("", "{", "[]", json.dumps({"version": "1.0"}), "\udcff"):
        (tmp_path / "tokenizer.json").write_text(damaged, errors="surrogateescape")
        with pytest.raises(ModelFolderError, match="cannot read"):
            TextTokenizer.load(tmp_path, config())


@given(st.lists(ids, max_size=30), st.booleans())
@thorough
def test_pieces_make_up_the_full_decoding(tokens: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=skip)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == TOKENIZER.decode(tokens, skip_special_tokens=skip)


@given(any_text)
@thorough
def test_pieces_of_a_text_hold_complete_characters_only(text: str) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=False)
    sent = ""
    for byte in text.encode():
        sent += detokenizer.push(token_of(bytes([byte])))
        assert text.startswith(sent)
    assert (sent, detokenizer.finish()) == (text, "")


def test_a_character_split_over_tokens_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in [*SMILE, token_of(b"a")]] == ["", "", "", "🙂", "a"]
    assert [detokenizer.push(token) for token in SMILE[:3]] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_bytes_that_are_no_character_are_replaced_when_that_is_certain() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    tokens = [SMILE[0], token_of(b"a"), SMILE[3]]
    assert [detokenizer.push(token) for token in tokens] == ["", "\ufffda", "\ufffd"]


@pytest.mark.parametrize("kind", ["wordpiece", "metaspace"])
def test_other_tokenizers_tell_what_a_token_adds_to_a_text(kind: str) -> None:
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "##ing": 1, "play": 2}, unk_token="[UNK]"))
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        expected = [b" [UNK]", b"ing", b" play"]
    else:
        vocabulary = {"<unk>": 0, "▁the": 1, "▁": 2, "n": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
        tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
        expected = [b"<unk>", b" the", b" ", b"n", b"\xe2", b"\x82", b"\xac"]
    text_tokenizer = TextTokenizer(tokenizer, config())
    assert [text_tokenizer.token_bytes(token) for token in range(len(expected))] == expected
    detokenizer = IncrementalDetokenizer(text_tokenizer)
    tokens = [len(expected) - 1, *range(1, len(expected))] if kind == "wordpiece" else [1, 4, 5, 6, 2, 3, 1]
    text = "".join(map(detokenizer.push, tokens)) + detokenizer.finish()
    assert text.strip() == text_tokenizer.decode(tokens).strip()


def cut_at_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: read character by character and end at the first stop string complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    include=st.booleans(),
)
@settings(thorough, max_examples=400)
def test_text_ends_at_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    expected, matched = cut_at_stop(text, stops, include)
    checker = StopChecker(tuple(stops), include_stop_str_in_output=include)
    edges = [0, *sorted(cuts), len(text)]
    sent = ""
    for start, end in pairwise(edges):
        sent += checker.push(text[start:end])
        assert expected.startswith(sent)
    assert (sent + checker.flush(), checker.matched) == (expected, matched)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    checker = StopChecker(("\n\nUser:", "END"))
    sent = [checker.push(text) for text in ("a\n", "\nUs", "ing E", "N", "d")]
    assert sent == ["a", "", "\n\nUsing ", "", "ENd"]
    assert checker.matched is None


def write(pieces: list[str | int], **params: Any) -> tuple[str, list[TextPiece]]:
    """Return the text and the pieces of an output whose tokens are given as ids or as text."""
    output = OutputText(TOKENIZER, SamplingParams(**params))
    tokens = [t for p in pieces for t in ([p] if isinstance(p, int) else TOKENIZER.encode(p))]
    written = []
    for token in tokens:
        written.append(output.push(token))
        if written[-1].finish_reason is not None:
            break
    return "".join(piece.text for piece in written) + output.flush(), written


def test_the_end_of_text_token_ends_the_text_and_releases_what_was_held() -> None:
    text, pieces = write(["the E", 0, "more"], stop=("END",))
    assert text == "the E"
    assert (pieces[-1].text, pieces[-1].finish_reason, pieces[-1].stop_reason) == ("E", "stop", None)


@pytest.mark.parametrize(("include", "expected"), [(False, "the "), (True, "the dog")])
def test_a_stop_token_shows_only_where_asked_for(include: bool, expected: str) -> None:
    dog = TOKENIZER.encode("dog")
    text, pieces = write(
        ["the ", *dog, "more"], stop_token_ids=(dog[-1],), include_stop_str_in_output=include
    )
    hidden = TOKENIZER.decode(dog[:-1])
    assert text == (expected if include else expected + hidden)
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", dog[-1])


@pytest.mark.parametrize(("include", "expected"), [(False, "the "), (True, "the lazy 🙂")])
def test_a_stop_string_may_span_tokens_and_end_inside_one(include: bool, expected: str) -> None:
    text, pieces = write(["the lazy ", *SMILE, "dog"], stop=("lazy 🙂",), include_stop_str_in_output=include)
    assert text == expected
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "lazy 🙂")


def test_nothing_ends_the_text_before_min_tokens() -> None:
    a, b = token_of(b"a"), token_of(b"b")
    text, pieces = write([a, 0, b, a, b, a], min_tokens=3, stop=("b",), stop_token_ids=(a,))
    assert (text, len(pieces), pieces[-1].stop_reason) == ("ab", 4, a)
    text, pieces = write([a, b, b, a, b, a], min_tokens=3, stop=("b",))
    assert (text, len(pieces), pieces[-1].stop_reason) == ("abba", 5, "b")


@pytest.mark.parametrize(("skip", "expected"), [(True, "ab"), (False, f"a{END}b")])
def test_an_ignored_end_of_text_token_is_text_where_special_tokens_are(skip: bool, expected: str) -> None:
    text, pieces = write(["a", 0, "b"], ignore_eos=True, skip_special_tokens=skip)
    assert text == expected
    assert pieces[-1].finish_reason is None


def test_offsets_say_where_each_tokens_text_begins() -> None:
    a = token_of(b"a")
    text, pieces = write([a, *SMILE, a, SMILE[0], a], stop=("aa",))
    assert text == "a🙂a\ufffda"
    assert [piece.offset for piece in pieces] == [0, 1, 1, 1, 1, 2, 3, 3]


@given(st.lists(ids, max_size=30), st.booleans())
@thorough
def test_without_a_stop_the_output_is_the_full_decoding(tokens: list[int], skip: bool) -> None:
    text, pieces = write(list(tokens), ignore_eos=True, skip_special_tokens=skip)
    assert text == TOKENIZER.decode(tokens, skip_special_tokens=skip)
    assert len(pieces) == len(tokens)


class TestChatTemplate:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        byte_level().save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    def test_none_in_most_folders(self, folder: Path) -> None:
        assert TextTokenizer.load(folder, config()).chat_template is None
        (folder / "tokenizer_config.json").write_text('{"eos_token": "x"}')
        assert TextTokenizer.load(folder, config()).chat_template is None

    @pytest.mark.parametrize("name", ["dape-kerple-8m", "kerple-8m"])
    def test_none_in_shipped_models(self, name: str) -> None:
        folder = SHIPPED / name
        assert TextTokenizer.load(folder, load_config(folder)).chat_template is None

    @pytest.mark.parametrize(
        "value",
        ["é{{ x }}", [{"name": "tool", "template": "t"}, {"name": "default", "template": "é{{ x }}"}]],
    )
    def test_in_the_tokenizers_settings(self, folder: Path, value: object) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert TextTokenizer.load(folder, config()).chat_template == "é{{ x }}"

    def test_its_own_file_goes_first(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text('{"chat_template": "old"}')
        (folder / "chat_template.jinja").write_text("new\n", encoding="utf-8")
        assert TextTokenizer.load(folder, config()).chat_template == "new\n"

    @pytest.mark.parametrize(
        "content",
        [
            b"{",
            b"[]",
            b'{"chat_template": 5}',
            b'{"chat_template": [5]}',
            b'{"chat_template": [{"name": "default"}]}',
            b"\xff\xfe",
        ],
    )
    def test_damaged_settings_are_named(self, folder: Path, content: bytes) -> None:
        (folder / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ModelFolderError, match=r"chat.template|tokenizer_config"):
            TextTokenizer.load(folder, config())

    def test_template_that_is_no_text(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(ModelFolderError, match=r"chat_template\.jinja is not UTF-8"):
            TextTokenizer.load(folder, config())
