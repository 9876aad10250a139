"""JSON schemas in the words that the grammar library knows, where these say exactly the same.

`oneOf` is the same as `anyOf` where no value can match two of its branches. That is proved here by types,
by listed values, by bounds of numbers, or by a required property whose values are apart in turn, such as the
tag of a union; through references as well. `not` is the same as `type` or `enum` where it only takes types or
listed values away. The rest is left as it is, for the library to accept or to refuse by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Final

TYPES: Final = frozenset({"null", "boolean", "object", "array", "number", "string"})
"""Of JSON; "integer" is taken for "number", whose whole values it has."""
ONE_INSIDE: Final = ("items", "additionalProperties", "additionalItems")
MANY_INSIDE: Final = ("properties", "patternProperties", "$defs", "definitions")
LISTS_INSIDE: Final = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
MAX_DEPTH: Final = 16
"""Of a proof: references and properties followed from a branch."""
MAX_COMPARISONS: Final = 20_000
"""Of all proofs for one schema. What is not proved by then is left to the library."""


def in_known_words(schema: dict[str, Any]) -> dict[str, Any]:
    """Return an equal schema, as far as possible without `oneOf` and `not`."""
    result: dict[str, Any] = _Rewriting(schema).of(schema)
    return result


class _Rewriting:
    """The rewriting of one schema, whose work is bounded."""

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._left = MAX_COMPARISONS

    def of(self, schema: Any) -> Any:
        """Return a part of the schema in known words."""
        if not isinstance(schema, dict):
            return schema
        result = dict(schema)
        for key, inner in schema.items():
            if key in ONE_INSIDE and isinstance(inner, dict):
                result[key] = self.of(inner)
            elif key in MANY_INSIDE and isinstance(inner, dict):
                result[key] = {name: self.of(part) for name, part in inner.items()}
            elif key in LISTS_INSIDE and isinstance(inner, list):
                result[key] = [self.of(part) for part in inner]
        branches = schema.get("oneOf")
        if isinstance(branches, list) and "anyOf" not in schema:
            whole = [_within(schema, self._resolved(branch)) for branch in branches]
            if all(self._apart(one, other) for one, other in combinations(whole, 2)):
                result["anyOf"] = result.pop("oneOf")
        return _without_not(result)

    def _apart(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Return whether it is certain that no value matches both schemas."""
        self._left -= 1
        one, other = self._resolved(one), self._resolved(other)
        if self._left < 0 or depth > MAX_DEPTH or not isinstance(one, dict) or not isinstance(other, dict):
            return False
        values, others = _values(one), _values(other)
        if values is not None and others is not None:
            return not values.keys() & others.keys()
        types, other_types = _types(one), _types(other)
        if types is None or other_types is None:
            return False
        return all(
            (name == "number" and (_is_below(one, other) or _is_below(other, one)))
            or (name == "object" and self._objects_apart(one, other, depth))
            for name in types & other_types
        )

    def _objects_apart(self, one: Mapping[str, Any], other: Mapping[str, Any], depth: int) -> bool:
        """Return whether the schemas differ in a property that both demand."""
        mine, others = _properties(one), _properties(other)
        return any(
            name in mine and name in others and self._apart(mine[name], others[name], depth + 1)
            for name in _required(one) & _required(other)
        )

    def _resolved(self, schema: Any) -> Any:
        """Return what a local reference leads to; what stands beside it only takes more values away."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(target := schema.get("$ref"), str):
                return schema
            if not target.startswith("#/") or "%" in target:
                return None
            schema = self._root
            for part in target.removeprefix("#/").split("/"):
                name = part.replace("~1", "/").replace("~0", "~")
                schema = schema.get(name) if isinstance(schema, dict) and "$id" not in schema else None
        return None


def _within(outer: Mapping[str, Any], branch: Any) -> Any:
    """Return a branch of `oneOf` with what the schema around it says as well."""
    if not isinstance(branch, dict):
        return branch
    around = {key: outer[key] for key in ("type", "enum", "const") if key in outer and key not in branch}
    return {
        **around,
        **branch,
        "properties": {**_properties(outer), **_properties(branch)},
        "required": [*_required(outer), *_required(branch)],
    }


def _without_not(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with `not` said by `type` or `enum`, where it can be."""
    taken = schema.get("not")
    if not isinstance(taken, dict) or len(taken) != 1:
        return schema
    rest = {key: value for key, value in schema.items() if key != "not"}
    taken_values, own_values = _values(taken), _values(schema)
    if taken_values is not None and own_values is not None:
        kept = [value for name, value in own_values.items() if name not in taken_values]
        rest.pop("const", None)
        return {**rest, "enum": kept}
    names = _names(taken)
    if "type" in taken and "integer" not in names and (types := _types(taken)) is not None:
        allowed = _names(schema) if "type" in schema else sorted(TYPES)
        kept = [name for name in allowed if _json_type(name) not in types]
        return {**rest, "type": kept}
    return schema


def _is_below(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether every number of one schema is below every number of another."""
    top = min((_bound(one, word, math.inf), word) for word in ("exclusiveMaximum", "maximum"))
    bottom = max((_bound(other, word, -math.inf), word) for word in ("minimum", "exclusiveMinimum"))
    return top[0] < bottom[0] or (top[0] == bottom[0] and (top[1], bottom[1]) != ("maximum", "minimum"))


def _bound(schema: Mapping[str, Any], word: str, default: float) -> float:
    bound = schema.get(word, default)
    return bound if isinstance(bound, (int, float)) and not isinstance(bound, bool) else default


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _required(schema: Mapping[str, Any]) -> frozenset[str]:
    required = schema.get("required")
    names = required if isinstance(required, list) else []
    return frozenset(name for name in names if isinstance(name, str))


def _values(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the listed values by their JSON text; None where there is no list, or not of plain values."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, (dict, list)) for value in values):
        return None
    # 1 and 1.0 are one value in JSON, true is another.
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in values)
    return dict(zip(map(json.dumps, whole), values, strict=True))


def _types(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the JSON types that may match; None where that is not said."""
    if (values := _values(schema)) is not None:
        names = [_type_of(value) for value in values.values()]
    elif names := _names(schema):
        names = [_json_type(name) for name in names]
    return frozenset(names) if names and TYPES.issuperset(names) else None


def _names(schema: Mapping[str, Any]) -> list[str]:
    """Return the names that `type` holds."""
    names = schema.get("type")
    names = [names] if isinstance(names, str) else names
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _json_type(name: str) -> str:
    return "number" if name == "integer" else name


def _type_of(value: bool | int | float | str | None) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return "string" if isinstance(value, str) else "number"
