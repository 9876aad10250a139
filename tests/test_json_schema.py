"""`oneOf` and `not` in other words: what is rewritten says the same; what cannot be proved is left."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dape_engine.errors import RequestError
from dape_engine.json_schema import in_known_words
from test_grammar import COMPILER, decoded, walk

TAGGED = {
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    "discriminator": {"propertyName": "kind"},
    "$defs": {
        "cat": {
            "type": "object",
            "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
            "required": ["kind", "lives"],
            "additionalProperties": False,
        },
        "dog": {
            "type": "object",
            "properties": {"kind": {"enum": ["dog", "puppy"]}},
            "required": ["kind"],
            "additionalProperties": False,
        },
    },
}
"""As pydantic writes a union with a tag."""


def tagged(kind: object, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": kind, **more}, "required": ["k"]}


APART = [
    ({"type": "integer"}, {"type": "string"}),
    ({"type": ["integer", "null"]}, {"type": ["string", "boolean"]}),
    ({"enum": [1, "a"]}, {"enum": [2, "b"]}),
    ({"const": True}, {"const": 1}),
    ({"const": "1"}, {"type": "number"}),
    ({"type": "integer", "maximum": 3}, {"type": "number", "exclusiveMinimum": 3}),
    ({"type": "number", "exclusiveMaximum": 0}, {"type": ["number", "string"], "minimum": 0}),
    (tagged({"const": "a"}), tagged({"const": "b"}, x={"type": "integer"})),
    (tagged(tagged({"const": "a"})), tagged(tagged({"const": "b"}))),
    ({"$ref": "#/$defs/text"}, {"type": "null"}),
    ({"$ref": "#/$defs/a~1b"}, {"type": "string"}),
]
TOGETHER = [
    ({"type": "integer"}, {"type": "number"}),
    ({"enum": [1, 2]}, {"enum": [2.0, 3]}),
    ({"const": "a"}, {"type": "string"}),
    ({"type": "integer", "maximum": 3}, {"type": "number", "minimum": 3}),
    ({"type": "array", "items": {"type": "null"}}, {"type": "array", "items": {"type": "string"}}),
    ({"properties": {"k": {"const": "a"}}, "type": "object"}, tagged({"const": "b"})),
    (tagged({"const": "a"}), tagged({"type": "string"})),
    ({}, {"type": "string"}),
    (True, {"type": "string"}),
    ({"$ref": "#/$defs/loop"}, {"type": "string"}),
    ({"$ref": "#/$defs/tree"}, {"$ref": "#/$defs/tree"}),
    ({"$ref": "#/$defs/text"}, {"$ref": "other.json"}),
    ({"$ref": "#/$defs/none"}, {"type": "string"}),
    ({"enum": [[1]]}, {"enum": [[2]]}),
    ({"type": "integer", "exclusiveMaximum": True, "maximum": 3}, {"type": "integer", "minimum": 3}),
]
DEFINITIONS = {
    "text": {"type": "string"},
    "loop": {"$ref": "#/$defs/loop"},
    "tree": tagged({"$ref": "#/$defs/tree"}),
    "a/b": {"type": "integer"},
    "a~1b": {"type": "string"},
}


@pytest.mark.parametrize(("pair", "apart"), [(p, True) for p in APART] + [(p, False) for p in TOGETHER])
def test_one_of_becomes_any_of_where_no_value_can_match_twice(pair: tuple[Any, Any], apart: bool) -> None:
    for branches in (list(pair), list(reversed(pair))):
        schema = {"oneOf": branches, "$defs": DEFINITIONS}
        wanted = {"anyOf": branches, "$defs": DEFINITIONS} if apart else schema
        assert in_known_words(schema) == wanted
        # Inside of others just the same.
        assert in_known_words({"items": schema, "$defs": DEFINITIONS})["items"] == wanted


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"not": {"type": "null"}}, {"type": ["array", "boolean", "number", "object", "string"]}),
        ({"type": ["integer", "null"], "not": {"type": "null"}}, {"type": ["integer"]}),
        ({"type": "integer", "not": {"type": "number"}}, {"type": []}),
        ({"enum": ["a", "b", 1], "not": {"const": "b"}}, {"enum": ["a", 1]}),
        ({"enum": [1, True], "not": {"enum": [1.0]}}, {"enum": [True]}),
        ({"enum": [2**60, 2**60 + 1], "not": {"const": 2**60}}, {"enum": [2**60 + 1]}),
        ({"const": "a", "not": {"const": "b"}}, {"enum": ["a"]}),
    ],
)
def test_not_becomes_what_is_left(schema: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert in_known_words(schema) == wanted


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "integer"}},
        {"not": {}},
        {"not": True},
        {"type": "string", "not": {"const": "a"}},
        {"type": "string", "not": {"type": "string", "maxLength": 3}},
        {"not": {"type": "magic"}},
        {"enum": [[1]], "not": {"const": 1}},
    ],
)
def test_other_negations_are_refused_by_name(schema: dict[str, Any]) -> None:
    assert in_known_words(schema) == schema
    with pytest.raises(RequestError, match="not"):
        COMPILER.compile("json", schema, "f")


def test_names_and_values_are_no_keywords() -> None:
    either = [{"type": "integer"}, {"type": "string"}]
    schema = {
        "properties": {"oneOf": {"type": "string"}, "not": {"oneOf": either}},
        "default": {"oneOf": either},
        "enum": [{"oneOf": either}],
    }
    wanted = {**schema, "properties": {"oneOf": {"type": "string"}, "not": {"anyOf": either}}}
    assert in_known_words(schema) == wanted


def test_what_stands_around_the_branches_counts() -> None:
    branches = [{"properties": {"k": {"const": "a"}}}, {"properties": {"k": {"const": "b"}}}]
    outer = {"type": "object", "required": ["k"]}
    assert in_known_words({**outer, "oneOf": branches}) == {**outer, "anyOf": branches}
    for word in outer:
        schema = {key: value for key, value in outer.items() if key != word} | {"oneOf": branches}
        assert in_known_words(schema) == schema
    # Both at once would have to match: that is not said in one word.
    both = {**outer, "oneOf": branches, "anyOf": [{"required": ["x"]}]}
    assert in_known_words(both) == both


@pytest.mark.parametrize("seed", range(8))
def test_tagged_unions_are_written(seed: int) -> None:
    value = json.loads(decoded(walk(COMPILER.compile("json", TAGGED, "f").constraint(), seed)))
    if value["kind"] == "cat":
        assert value.keys() == {"kind", "lives"}
        assert isinstance(value["lives"], int)
    else:
        assert value in ({"kind": "dog"}, {"kind": "puppy"})


SCALARS = st.sampled_from([None, True, 0, 1, 2, 1.0, "", "a"])
LEAVES = st.one_of(
    st.builds(lambda value: {"const": value}, SCALARS),
    st.builds(lambda values: {"enum": values}, st.lists(SCALARS, max_size=3)),
    st.builds(
        lambda names: {"type": names}, st.sampled_from(["null", "integer", "number", ["string", "null"]])
    ),
    st.builds(
        lambda low, high, word: {"type": "number", word: low, "maximum": high},
        st.integers(-1, 3),
        st.integers(-1, 3),
        st.sampled_from(["minimum", "exclusiveMinimum"]),
    ),
)
SCHEMAS = st.one_of(LEAVES, st.builds(tagged, LEAVES))
VALUES = [*(None, True, False, -1, 0, 0.5, 1, 1.5, 2, 3, "", "a"), {}]
VALUES += [{"k": value} for value in VALUES]


def matches(schema: dict[str, Any], value: Any) -> bool:
    """Say what the words used here mean, as the specification has it."""

    def same(one: Any, other: Any) -> bool:
        return isinstance(one, bool) == isinstance(other, bool) and one == other

    def is_a(name: str) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return {
            "null": value is None,
            "boolean": isinstance(value, bool),
            "string": isinstance(value, str),
            "object": isinstance(value, dict),
            "array": isinstance(value, list),
            "number": number,
            "integer": number and value == int(value),
        }[name]

    names = schema.get("type", [])
    low, above, high = (schema.get(word) for word in ("minimum", "exclusiveMinimum", "maximum"))
    return all(
        (
            "type" not in schema or any(map(is_a, [names] if isinstance(names, str) else names)),
            "const" not in schema or same(schema["const"], value),
            "enum" not in schema or any(same(listed, value) for listed in schema["enum"]),
            not is_a("number") or low is None or value >= low,
            not is_a("number") or above is None or value > above,
            not is_a("number") or high is None or value <= high,
            not is_a("object") or value.keys() >= set(schema.get("required", ())),
            not is_a("object")
            or all(matches(part, value[k]) for k, part in schema.get("properties", {}).items() if k in value),
            "oneOf" not in schema or sum(matches(part, value) for part in schema["oneOf"]) == 1,
            "anyOf" not in schema or any(matches(part, value) for part in schema["anyOf"]),
            "not" not in schema or not matches(schema["not"], value),
        )
    )


@settings(max_examples=400, deadline=None)
@given(st.lists(SCHEMAS, min_size=2, max_size=3), LEAVES, LEAVES)
def test_every_value_matches_both_forms_or_neither(
    branches: list[dict[str, Any]], own: dict[str, Any], taken: dict[str, Any]
) -> None:
    for schema in ({"oneOf": branches}, {**own, "oneOf": branches}, {**own, "not": taken}, {"not": taken}):
        rewritten = in_known_words(schema)
        assert [matches(rewritten, value) for value in VALUES] == [matches(schema, value) for value in VALUES]


def many(count: int) -> dict[str, Any]:
    return {"oneOf": [{"const": number} for number in range(count)]}


def maze() -> dict[str, Any]:
    """Ways through properties that multiply at every step."""
    names = [f"p{number}" for number in range(30)]
    node = {
        "type": "object",
        "properties": {name: {"$ref": "#/$defs/n"} for name in names},
        "required": names,
    }
    return {"oneOf": [{"$ref": "#/$defs/n"}] * 2, "$defs": {"n": node}}


@pytest.mark.parametrize("schema", [many(4500), maze()], ids=["many branches", "maze"])
def test_proofs_are_bounded(schema: dict[str, Any]) -> None:
    begun = time.monotonic()
    assert "oneOf" in in_known_words(schema)
    assert time.monotonic() - begun < 5


def test_a_long_list_of_branches_is_compared() -> None:
    assert "anyOf" in in_known_words(many(150))
    assert int(decoded(walk(COMPILER.compile("json", many(150), "f").constraint(), 0))) in range(150)
