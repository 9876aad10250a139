"""Grammars: whatever the model says, the text matches; sources are bounded; failures stay with one text."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from dape_engine.errors import RequestError
from dape_engine.grammar import MAX_GRAMMAR_BYTES, MAX_NESTING, GrammarCompiler
from dape_engine.request import SamplingParams
from dape_engine.sampling import SamplerState, sample
from dape_engine.tokenizer import TextTokenizer
from fakes import BOS, EOS, byte_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", 'b\n"é']}, "maxItems": 3},
        "more": {"$ref": "#/$defs/flag"},
    },
    "$defs": {"flag": {"type": ["boolean", "null"]}},
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
}
WORDS = ["yes", "no", 'a "quoted"\\ word', "é🙂\n\t", "<s>"]
SUM = 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,2}/'
GBNF = 'root ::= item ("," item){0,3}\nitem ::= [a-c] | "xyz"'


def vocabulary(eos: int | None = EOS) -> TextTokenizer:
    tokenizer = byte_tokenizer()
    config = SimpleNamespace(bos_token_id=BOS, eos_token_id=eos)
    return TextTokenizer(tokenizer, config)


TOKENIZER = vocabulary()
V = TOKENIZER.vocab_size + 5
"""As of a padded model: the last ids have no text."""
COMPILER = GrammarCompiler(TOKENIZER, V)


def walk(constraint, seed, *, eos=EOS, most=4000, **params):
    """Draw tokens with random logits until the text is over; return its tokens."""
    generator = torch.Generator().manual_seed(seed)
    state = SamplerState(SamplingParams(seed=seed, logprobs=0, **params), [BOS], eos, V, constraint)
    tokens = []
    while not constraint.is_complete and len(tokens) < most:
        # The model is fond of special tokens and of those without text.
        logits = torch.randn(1, V, generator=generator) * 3
        logits[0, [EOS, BOS, V - 1]] += 6
        (drawn,) = sample(logits, [state])
        assert drawn.logprob == pytest.approx(logits.log_softmax(-1)[0, drawn.token_id].item(), abs=1e-6)
        state.append(drawn.token_id)
        assert constraint.error is None
        if drawn.token_id == EOS:
            break
        tokens.append(drawn.token_id)
    return tokens


def decoded(tokens):
    return b"".join(map(TOKENIZER.token_bytes, tokens)).decode()


class TestWalks:
    @pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 0.0}, {"top_k": 1}])
    @pytest.mark.parametrize("seed", range(4))
    def test_json_schema(self, seed, params):
        grammar = COMPILER.compile("json", SCHEMA, "f")
        text = decoded(walk(grammar.constraint(), seed, **params))
        value = json.loads(text)
        assert list(value) == SCHEMA["required"]
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 6
        assert 0 <= value["age"] <= 120
        assert len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"a", 'b\n"é'}
        assert value["more"] in (True, False, None)
        # Models that are small never leave optional whitespace again.
        assert text == json.dumps(value, separators=(",", ":"), ensure_ascii=False) or "\\" in text

    @pytest.mark.parametrize("seed", range(6))
    def test_any_object(self, seed):
        text = decoded(walk(COMPILER.compile("json", {"type": "object"}, "f").constraint(), seed, top_k=3))
        assert isinstance(json.loads(text), dict)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(
        "pattern", [r"[a-z]{2,5}@[a-z]+\.(org|net)", r"[0-9]{4}-[0-9]{2}", r"(a|b){0,9}é?"]
    )
    def test_regex(self, pattern, seed):
        text = decoded(walk(COMPILER.compile("regex", pattern, "f").constraint(), seed))
        assert re.fullmatch(pattern, text)

    def test_choice(self):
        grammar = COMPILER.compile("choice", WORDS, "f")
        texts = {decoded(walk(grammar.constraint(), seed)) for seed in range(40)}
        assert texts == set(WORDS)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(
        ("source", "pattern"), [(SUM, r"\d{1,2}(\+\d{1,2})*"), (GBNF, r"([abc]|xyz)(,([abc]|xyz)){0,3}")]
    )
    def test_grammar(self, source, pattern, seed):
        text = decoded(walk(COMPILER.compile("grammar", source, "f").constraint(), seed))
        assert re.fullmatch(pattern, text)

    def test_special_tokens_spelled_in_a_choice_are_drawn_as_text(self):
        tokens = walk(COMPILER.compile("choice", ["<s>"], "f").constraint(), 0)
        assert BOS not in tokens
        assert decoded(tokens) == "<s>"

    def test_whitespace_where_the_schema_asks_for_it(self):
        schema = {**SCHEMA, "x-guidance": {"whitespace_pattern": " {1}"}}
        text = decoded(walk(COMPILER.compile("json", schema, "f").constraint(), 1))
        assert " " in text.replace(json.loads(text)["name"], "")


class TestEnd:
    def test_only_the_end_may_follow(self):
        constraint = COMPILER.compile("choice", ["on"], "f").constraint()
        assert not constraint.is_complete
        constraint.append(TOKENIZER.encode("on", add_special_tokens=False)[0])
        assert constraint.is_complete

    def test_the_end_is_allowed_where_the_text_may_go_on(self):
        constraint = COMPILER.compile("regex", "a+", "f").constraint()
        assert EOS not in allowed(constraint)
        constraint.append(TOKENIZER.encode("a", add_special_tokens=False)[0])
        assert EOS in allowed(constraint)
        assert not constraint.is_complete

    def test_min_tokens_puts_the_end_off(self):
        tokens = walk(COMPILER.compile("regex", "a*", "f").constraint(), 0, min_tokens=30)
        assert len(tokens) >= 30

    def test_grammar_wins_over_min_tokens(self):
        assert decoded(walk(COMPILER.compile("regex", "a{0,3}", "f").constraint(), 0, min_tokens=9)) == "aaa"
        assert walk(COMPILER.compile("regex", "", "f").constraint(), 0, min_tokens=9) == []

    def test_ignored_end_is_avoided_while_the_text_may_go_on(self):
        tokens = walk(COMPILER.compile("regex", "a*", "f").constraint(), 0, ignore_eos=True, most=50)
        assert len(tokens) == 50

    def test_model_without_an_end(self):
        tokenizer = vocabulary(eos=None)
        compiler = GrammarCompiler(tokenizer, V)
        constraint = compiler.compile("regex", "(on|the){2}", "f").constraint()
        assert re.fullmatch("(on|the){2}", decoded(walk(constraint, 0, eos=None)))

    def test_grammar_wins_over_biases_and_bad_words(self):
        ban = tuple((token, -100.0) for token in range(V))
        a = TOKENIZER.encode("a", add_special_tokens=False)
        text = walk(
            COMPILER.compile("regex", "a{5}", "f").constraint(), 0, logit_bias=ban, bad_words=(tuple(a),)
        )
        assert decoded(text) == "aaaaa"


def allowed(constraint):
    logits = torch.zeros(V)
    constraint.restrict(logits)
    return {token for token in range(V) if logits[token] == 0}


def test_completions_of_one_grammar_share_nothing():
    grammar = COMPILER.compile("regex", "ab|cd", "f")
    first, second = grammar.constraint(), grammar.constraint()
    (a,) = TOKENIZER.encode("a", add_special_tokens=False)
    first.append(a)
    assert allowed(first) == set(TOKENIZER.encode("b", add_special_tokens=False))
    assert a in allowed(second)


def test_allowed_tokens_are_those_that_keep_the_text_possible():
    ids = {TOKENIZER.token_bytes(token): token for token in range(V)}
    constraint = COMPILER.compile("regex", "(the|a) cat", "f").constraint()
    assert allowed(constraint) == {ids[b"t"], ids[b"th"], ids[b"the"], ids[b"a"]}


def test_text_without_a_choice_is_written_in_the_tokenizers_own_tokens():
    constraint = COMPILER.compile("regex", "the cat", "f").constraint()
    expected = TOKENIZER.encode("the cat", add_special_tokens=False)
    assert walk(constraint, 0) == expected


def chain(levels, nested):
    """A schema of so many levels, by definitions of `nested` levels that lead into each other."""
    count = levels // nested
    definitions = {f"a{count}": {"type": "null"}}
    for i in range(count):
        inner = {"$ref": f"#/$defs/a{i + 1}"}
        for _ in range(nested - 1):
            inner = {"items": inner}
        definitions[f"a{i}"] = inner
    return {"$ref": "#/$defs/a0", "$defs": definitions}


def rules(levels, nested):
    """A grammar of so many rules and brackets that lead into each other."""
    count = levels // nested
    ways = (f"r{i}: {'(' * (nested - 1)}r{i + 1}{')' * (nested - 1)}\n" for i in range(count))
    return "start: r0\n" + "".join(ways) + f'r{count}: "a"\n'


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "source", "says"),
        [
            ("json", {"type": "wat"}, "Invalid type"),
            ("json", {"not": {"minLength": 3}}, "not"),
            ("json", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
            ("json", {"$ref": "#/$defs/none"}, "does not exist"),
            ("json", {"enum": []}, ""),
            ("json", {"enum": [1, math.inf]}, "double precision"),
            ("regex", "[a-z", "regex"),
            ("regex", "a(?=b)", "regex"),
            ("grammar", "start: (", "token"),
            ("grammar", "start: missing", "missing"),
            ("grammar", "", "rule"),
            ("grammar", 'root ::= "a', "end of input"),
            ("grammar", "root ::= " + "(" * 300, ""),
            ("grammar", "start: " + "(" * 300 + '"a"' + ")" * 300, "deep"),
            ("grammar", "start: start", ""),
        ],
    )
    def test_reason_is_named(self, kind, source, says):
        with pytest.raises(RequestError) as refused:
            COMPILER.compile(kind, source, "response_format")
        error = refused.value
        assert (error.param, error.code) == ("response_format", "invalid_grammar")
        assert says in error.message
        assert len(error.message) < 400
        assert error.message.isprintable()

    @pytest.mark.parametrize(
        ("kind", "source", "limit"),
        [
            ("json", {"enum": ["x" * 100] * 1000}, "65536"),
            ("regex", "a" * 4097, "4096"),
            ("choice", ["a"] * 1025, "1024"),
            ("choice", ["a" * 1000] * 20, "16384"),
            ("grammar", "start: " + '"a" ' * 5000, "16384"),
        ],
    )
    def test_size_is_bounded(self, kind, source, limit):
        with pytest.raises(RequestError, match=f"above the limit of {limit}"):
            COMPILER.compile(kind, source, "f")

    @pytest.mark.parametrize("nested", [1, 20])
    def test_chains_are_bounded(self, nested):
        """The library follows them by recursion; above a thousand levels they would end the process."""
        schema, grammar = chain(MAX_NESTING, nested), rules(MAX_NESTING, nested)
        for kind, source in (("json", schema), ("grammar", grammar)):
            with pytest.raises(RequestError, match=f"above the limit of {MAX_NESTING}"):
                COMPILER.compile(kind, source, "f")

    @pytest.mark.parametrize("nested", [1, 19])
    def test_longest_chains_are_served(self, nested):
        # Each definition adds a name and a level or two to the bound.
        walk(COMPILER.compile("json", chain(MAX_NESTING // 3, nested), "f").constraint(), 0, most=20)
        walk(COMPILER.compile("grammar", rules(MAX_NESTING - 2, nested), "f").constraint(), 0, most=20)

    def test_large_flat_schemas_are_served(self):
        names = [f"name{i}" for i in range(300)]
        schema = {
            "type": "object",
            "properties": {name: {"type": "array", "items": {"enum": names[:2]}} for name in names},
            "$defs": {"a": {"type": "string"}},
        }
        assert COMPILER.compile("json", schema, "f").constraint().error is None

    def test_grammar_that_outgrows_its_limits_ends_its_own_text_only(self):
        """Every step makes the rows of this one longer."""
        source = 'start: ("a"{1,10000}){1,10000}'
        assert len(source) < MAX_GRAMMAR_BYTES
        constraint = COMPILER.compile("grammar", source, "f").constraint()
        (a,) = TOKENIZER.encode("a", add_special_tokens=False)
        for _ in range(200):
            logits = torch.zeros(V)
            constraint.restrict(logits)
            constraint.append(a)
            if constraint.error is not None:
                break
        assert constraint.error.param == "f"
        assert not constraint.is_complete
        logits = torch.zeros(V)
        constraint.restrict(logits)
        assert (logits == 0).all()
