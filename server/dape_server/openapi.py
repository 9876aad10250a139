"""The server's description in OpenAPI's form: every route names exactly the statuses it can answer with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from dape_server.errors import ErrorResponse
from dape_server.json_body import JsonRoute
from dape_server.protocol.common import RequestBody, WorkBody

KEY_SCHEME = "key"
ANY = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HTTPStatus.INTERNAL_SERVER_ERROR)
"""Of every route: too large headers, a defect."""
BODY = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
"""Of routes that read a body: what it holds, how it comes, and that the server may take no work now."""
WORK = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.GATEWAY_TIMEOUT)
"""Of routes that wait for the engine: its queue is full, the request's time is up."""


def describe(
    app: FastAPI, routers: Iterable[APIRouter], has_keys: bool, open_paths: frozenset[str]
) -> Callable[[], dict[str, Any]]:
    """Return the function that describes an app.

    Args:
        app: with its routes.
        routers: where these come from.
        has_keys: whether a key is needed.
        open_paths: paths that need none.
    """
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _amend_components(schema.setdefault("components", {}), has_keys)
            for route in routes:
                if route.include_in_schema:
                    _amend_route(schema, route, has_keys and route.path not in open_paths)
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi


def _amend_components(components: dict[str, Any], has_keys: bool) -> None:
    schemas = components.setdefault("schemas", {})
    # FastAPI's own refusals, which this server does not use.
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    refusal = ErrorResponse.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update({**refusal.pop("$defs"), "ErrorResponse": refusal})
    for body in _subclasses(RequestBody):
        if body.__name__ in schemas:
            _allow_null(schemas[body.__name__])
    if has_keys:
        components["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}


def _subclasses(body: type[RequestBody]) -> Iterator[type[RequestBody]]:
    for subclass in body.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _allow_null(schema: dict[str, Any]) -> None:
    """Say of every field with a default that null means the default."""
    for name in schema["properties"].keys() - set(schema.get("required", ())):
        field = schema["properties"][name]
        if {"type": "null"} not in field.get("anyOf", ()):
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}


def _amend_route(schema: dict[str, Any], route: APIRoute, guarded: bool) -> None:
    for method in route.methods or ():
        operation = schema["paths"][route.path_format][method.lower()]
        operation["responses"].pop("422", None)
        for status in _statuses(route, guarded):
            operation["responses"].setdefault(str(status.value), _refusal(status))
        if "stream" in _fields(route):
            operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        if guarded:
            operation["security"] = [{KEY_SCHEME: []}]


def _statuses(route: APIRoute, guarded: bool) -> Iterator[HTTPStatus]:
    yield from ANY
    if guarded:
        yield HTTPStatus.UNAUTHORIZED
    if not isinstance(route, JsonRoute) or route.body_field is None:
        return
    yield from BODY
    if "model" in _fields(route):
        yield HTTPStatus.NOT_FOUND
    if _fields(route).keys() >= WorkBody.model_fields.keys():
        yield from WORK


def _fields(route: APIRoute) -> dict[str, Any]:
    """Return the fields of a route's body by name."""
    fields: dict[str, Any] = {}
    if route.body_field is not None:
        fields = getattr(route.body_field.field_info.annotation, "model_fields", {})
    return fields


def _refusal(status: HTTPStatus) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ErrorResponse"}
    return {"description": status.phrase, "content": {"application/json": {"schema": schema}}}
