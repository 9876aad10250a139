"""Our own description of the server against the server: schemathesis makes requests from it, right and wrong.

And the other way round: every status that a route is said to answer with is brought about.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from dape_engine.errors import DeadlineError
from dape_server.app import ROUTERS, create_app
from dape_server.protocol.common import WorkBody
from dape_server.settings import ServerSettings
from fakes import JSON, FakeEngine, serving
from live import PATIENCE, Live, live
from test_hard_numbers import ROUTES, VALID

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
)


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    """A server on a socket, in a thread of its own."""
    loop = asyncio.new_event_loop()
    started: Future[Live] = Future()
    done = asyncio.Event()

    async def serve() -> None:
        async with live(FakeEngine(max_model_len=32), patience=600) as server:
            started.set_result(server)
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    yield started.result(PATIENCE)
    loop.call_soon_threadsafe(done.set)
    thread.join()
    loop.close()


DESCRIPTION = schemathesis.openapi.from_dict(create_app(FakeEngine(), ServerSettings()).openapi())
OPERATIONS = [operation.ok() for operation in DESCRIPTION.get_all_operations()]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_the_server_is_as_described(served, operation, mode, data):
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("any request is right")
    case = data.draw(operation.as_strategy(generation_mode=mode))
    answer = case.call(base_url=f"http://127.0.0.1:{served.port}")
    case.validate_response(answer, checks=CHECKS)
    assert served.engine.free_blocks == served.engine.num_blocks


# --- Every documented status is true -------------------------------------------------------------


def documented(client: Any, path: str, method: str) -> set[int]:
    responses = client.app.openapi()["paths"][path][method]["responses"]
    return {int(status) for status in responses}


def provoke(path: str) -> dict[int, int]:
    """Return what the route answers when each refusal is brought about: {wanted: got}."""
    body = VALID[path]
    content = json.dumps(body)
    got: dict[int, int] = {}
    with serving(api_key=("k",), max_body_size=2048) as client:
        headers = {**JSON, "Authorization": "Bearer k"}

        def post(text: str = content, **more: str) -> int:
            return client.post(path, content=text, headers={**headers, **more}).status_code

        got[200] = post()
        got[400] = post("[")
        got[401] = client.post(path, content=content, headers=JSON).status_code
        got[404] = post(json.dumps({**body, "model": "other"}))
        got[413] = post(content.ljust(3000))
        got[415] = post(**{"content-type": "text/plain"})
        got[431] = post(**{"x-long": "x" * 20_000})
        if issubclass(ROUTES[path], WorkBody):
            client.engine.fails_with = DeadlineError("too late")
            got[504] = post()
            client.engine.fails_with = RuntimeError("a defect")
            got[500] = post()
            client.engine.limit = 0
            got[429] = post()
        client.app.state.context.lifecycle.drain()
        got[503] = post()
    return got


@pytest.mark.parametrize("path", ROUTES)
def test_every_documented_refusal_of_a_body_can_happen(path):
    got = provoke(path)
    if path == "/v1/chat/completions":
        # The fake model has no chat template.
        for status in (200, 429, 500, 504):
            assert got.pop(status) == 400
    assert all(wanted == status for wanted, status in got.items()), got
    with serving(api_key=("k",)) as client:
        names = documented(client, path, "post")
    assert got.keys() <= names
    # Slow bodies are tested on sockets; a defect outside the engine's work is the middleware's to answer.
    assert names - got.keys() <= {408, 500, 200, 429, 504}
    if not issubclass(ROUTES[path], WorkBody):
        assert not names & {429, 504}


def test_other_routes_document_what_they_answer():
    with serving(api_key=("k",)) as client:
        described = {
            (path, method)
            for path, operations in client.app.openapi()["paths"].items()
            for method in operations
        }
        plain = {
            (route.path_format, method.lower())
            for router in ROUTERS
            for route in router.routes
            if route.include_in_schema
            for method in route.methods
        }
        assert described == plain
        for path, method in described:
            names = documented(client, path, method)
            assert {431, 500} <= names
            assert (401 in names) == (path not in ("/health", "/"))
            assert 422 not in names
        client.engine.failure = "the engine has failed"
        for path in ("/health", "/ready"):
            answer = client.request("GET", path, headers={"Authorization": "Bearer k"})
            assert answer.status_code == 503
            assert 503 in documented(client, path, "get")
        assert 404 in documented(client, "/v1/models/{name}", "get")


def test_without_keys_no_401_is_promised():
    with serving() as client:
        schema = client.get("/openapi.json").json()
    assert '"401"' not in json.dumps(schema)
    assert "HTTPValidationError" not in schema["components"]["schemas"]
