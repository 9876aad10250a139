"""Long texts are tokenised in pieces: the ids are those of the whole, and other threads run meanwhile."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

import dape_engine.long_text
import dape_engine.tokenizer
from dape_engine.config import ModelConfig, PositionConfig
from dape_engine.errors import RequestError
from dape_engine.long_text import can_cut, pieces
from dape_engine.tokenizer import TextTokenizer
from fakes import byte_tokenizer

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
    train_length=8,
    max_model_len=8,
    position=PositionConfig(kind="nope"),
)
FRAGMENTS = ["the", " cat", "'s", "5", "don't", ",", "_", "-", "日本", "🙂", "<s>"]
SPACES = [
    " ",
    "  ",
    "\n",
    "\n \n",
    "\r\n",
    "\t",
    "\u3000",
    "\x1c",
    "\x85",
    "\u180e",
    "\u200b",
    "e\u0301",
    " \u0301",
]
fragments = st.sampled_from([*FRAGMENTS, "<|endoftext|>", *SPACES])
texts = st.lists(fragments, max_size=60).map("".join)


@pytest.fixture
def short_pieces(monkeypatch):
    for module in (dape_engine.long_text, dape_engine.tokenizer):
        monkeypatch.setattr(module, "PIECE", 5)


def words(library, text):
    return [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=texts, nfc=st.booleans(), bos=st.booleans(), special=st.booleans())
def test_pieces_give_the_ids_of_the_whole(text, nfc, bos, special):
    library = byte_tokenizer(adds_bos=bos)
    if nfc:
        library.normalizer = normalizers.NFC()
    whole = library.encode(text, add_special_tokens=special).ids
    with pytest.MonkeyPatch.context() as patch:
        for module in (dape_engine.long_text, dape_engine.tokenizer):
            patch.setattr(module, "PIECE", 5)
        assert "".join(pieces(text)) == text
        # Not only these merges: any would give the same ids from the same words.
        assert [word for piece in pieces(text) for word in words(library, piece)] == words(library, text)
        assert TextTokenizer(library, CONFIG).encode(text, add_special_tokens=special) == whole


@pytest.mark.usefixtures("short_pieces")
def test_special_tokens_stand_once_around_the_whole():
    library = byte_tokenizer()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 1), ("<|endoftext|>", 0)]
    )
    ids = TextTokenizer(library, CONFIG).encode("the cat on the cat on the cat")
    assert (ids.count(1), ids.count(0), ids[0], ids[-1]) == (1, 1, 1, 0)


def prefixed(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def metaspace(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()


def lower_case(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


def with_spaces(tokenizer):
    tokenizer.add_tokens([AddedToken("new york")])


def stripping(tokenizer):
    tokenizer.add_tokens([AddedToken("<mask>", rstrip=True)])


@pytest.mark.parametrize("change", [prefixed, metaspace, lower_case, with_spaces, stripping])
def test_other_tokenizers_are_left_alone(change):
    tokenizer = byte_tokenizer()
    assert can_cut(tokenizer)
    change(tokenizer)
    assert not can_cut(tokenizer)


def test_other_models_are_left_alone():
    assert not can_cut(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.usefixtures("short_pieces")
def test_a_text_without_a_place_to_cut_is_bounded(monkeypatch):
    monkeypatch.setattr(dape_engine.tokenizer, "LONGEST_PIECE", 20)
    tokenizer = TextTokenizer(byte_tokenizer(), CONFIG)
    assert tokenizer.encode("the cat " * 20)
    with pytest.raises(RequestError, match=r"input: 21 characters .* limit of 20") as refused:
        tokenizer.encode("x" * 21, param="input")
    assert refused.value.param == "input"


def test_other_threads_run_during_tokenisation():
    """The library's `encode` holds Python's lock to its end; this must not come back."""
    tokenizer = TextTokenizer(byte_tokenizer(), CONFIG)
    work = threading.Thread(target=tokenizer.encode, args=("x" * 1_000_000,))
    turns = 0
    work.start()
    while work.is_alive():
        work.join(0.001)
        turns += 1
    assert turns > 5
