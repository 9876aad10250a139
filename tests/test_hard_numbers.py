"""Every numeric field of every body, found in the models themselves: new fields are tested too.

No number may end in a failure or reach the engine unbounded, and null always means the default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from dape_server.app import ROUTERS
from dape_server.json_body import JsonRoute
from fakes import CANARY, COMPLETIONS, JSON, FakeEngine, serving

VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": f"the {CANARY}", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": f"the {CANARY}"}], "max_tokens": 2},
    "/v1/perplexity": {"input": f"the {CANARY}"},
    "/v1/attention_bias": {"input": f"the {CANARY}"},
    "/tokenize": {"prompt": f"the {CANARY}"},
    "/detokenize": {"tokens": [5, 6]},
}
"""A body that is right, for every route that takes one."""


def json_routes() -> dict[str, Any]:
    """Return the model of the body by path, for all routes of the application."""
    routes = [route for router in ROUTERS for route in router.routes if route.body_field is not None]
    assert all(isinstance(route, JsonRoute) for route in routes)
    return {route.path: route.body_field.field_info.annotation for route in routes}


ROUTES = json_routes()


def numbers(model: Any) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """Yield where numbers may stand in a body, and their schema."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})

    def walk(node: dict[str, Any], place: tuple[str | int, ...]) -> Iterator[Any]:
        if "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[1]]
        for option in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from walk(option, place)
        if node.get("type") in ("integer", "number"):
            yield place, node
        elif node.get("type") == "array" and "items" in node:
            yield from walk(node["items"], (*place, 0))
        elif node.get("type") == "object":
            for name, child in node.get("properties", {}).items():
                if set(node.get("required", ())) <= {name} or not place:
                    yield from walk(child, (*place, name))
            if isinstance(node.get("additionalProperties"), dict):
                yield from walk(node["additionalProperties"], (*place, "5"))

    found = {}
    for place, node in walk(schema, ()):
        # Prompts as token ids have their own rules and tests.
        if place[0] not in ("prompt", "input"):
            found.setdefault(place, node)
    yield from found.items()


CASES = [
    pytest.param(path, place, node, id=f"{path}-{'.'.join(map(str, place))}")
    for path, model in ROUTES.items()
    for place, node in numbers(model)
]
WRONG_KINDS = ['"1"', '"NaN"', "true", "false", "{}"]
TOO_MUCH = [str(2**64), str(-(2**64)), "1e308", "-1e308", "1e999", "-1e999", "9" * 400, "-" + "9" * 4000]
NOT_JSON = ["NaN", "Infinity", "-Infinity", "nan", "+1", "0x1", "01", "1_0", "1."]
UNUSUAL = ["0", "-0", "-0.0", "5e-324", "-5e-324", "-1", str(2**31), str(-(2**31)), str(2**63), "1e2"]


def test_a_right_body_is_known_for_every_route():
    assert VALID.keys() >= ROUTES.keys()
    assert len(CASES) > 40


@pytest.fixture(scope="module")
def client():
    with serving(FakeEngine(max_model_len=32)) as client:
        yield client


def with_number(path: str, place: tuple[str | int, ...], text: str) -> str:
    """Return a right body as JSON text, but for one number."""
    value: Any = "NUMBER"
    for key in reversed(place[1:]):
        value = [value] if isinstance(key, int) else {key: value}
    return json.dumps({**VALID[path], place[0]: value}).replace('"NUMBER"', text)


def post(client, path: str, body: str):
    """Post a body; whatever the answer, check its form and that nothing is left of the request."""
    answer = client.post(path, content=body, headers=JSON)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert CANARY not in answer.text
        assert len(answer.text) < 1000
        assert not re.search(r"0x[0-9a-f]{6,}", answer.text)
    assert client.engine.free_blocks == client.engine.num_blocks
    return answer


def check_refused(client, path: str, place: tuple[str | int, ...], text: str) -> None:
    error = post(client, path, with_number(path, place, text)).json().get("error")
    assert error is not None, text
    assert (error["param"] or "").split(".")[0] == place[0], (text, error)


@pytest.mark.parametrize(("path", "place", "node"), CASES)
def test_other_things_than_numbers_are_refused(client, path, place, node):
    wrong = [*WRONG_KINDS, "1.5"] if node["type"] == "integer" else WRONG_KINDS
    for text in wrong:
        if _means_something_else(path, place, text):
            continue
        check_refused(client, path, place, text)


def _means_something_else(path: str, place: tuple[str | int, ...], text: str) -> bool:
    """Return whether the field takes such a value too, beside numbers."""
    kinds = {"true": "boolean", "false": "boolean", "{}": "object"}
    kind = kinds.get(text, "number" if text == "1.5" else "string")
    schema = ROUTES[path].model_json_schema()["properties"][place[0]]
    return len(place) == 1 and kind in {option.get("type") for option in schema.get("anyOf", ())}


@pytest.mark.parametrize(("path", "place", "node"), CASES)
def test_every_number_has_bounds(client, path, place, node):
    del node
    for text in TOO_MUCH:
        check_refused(client, path, place, text)


@pytest.mark.parametrize(("path", "place", "node"), CASES)
def test_numbers_that_are_not_json_are_refused(client, path, place, node):
    del node
    for text in NOT_JSON:
        error = post(client, path, with_number(path, place, text)).json()["error"]
        assert error["code"] == "invalid_json"


@pytest.mark.parametrize(("path", "place", "node"), CASES)
def test_unusual_numbers_are_served_or_refused_by_their_bounds(client, path, place, node):
    for text in UNUSUAL:
        answer = post(client, path, with_number(path, place, text))
        number = float(text)
        inside = (
            node.get("minimum", -1e300) <= number <= node.get("maximum", 1e300)
            and node.get("exclusiveMinimum", -1e300) < number < node.get("exclusiveMaximum", 1e300)
            and (node["type"] == "number" or re.fullmatch(r"-?\d+", text))
        )
        assert inside or answer.status_code == 400, text
    answer = client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": 1})
    assert answer.status_code == 200


@pytest.mark.parametrize(("path", "model"), ROUTES.items(), ids=ROUTES)
def test_null_means_the_default_in_every_field(client, path, model):
    def answer(**extra: Any) -> Any:
        reply = client.post(path, json={**VALID[path], **extra})
        body = reply.json()
        for changing in ("id", "created", "usage"):
            body.pop(changing, None)
        return reply.status_code, body

    plain = answer()
    for name, field in model.model_fields.items():
        if not field.is_required():
            given = {key: value for key, value in VALID[path].items() if key == name}
            if not given:
                assert answer(**{name: None}) == plain, name
