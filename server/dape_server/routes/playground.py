"""GET / and its assets: the playground page, from memory. It holds no data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request, Response

from dape_server.errors import HttpError

router = APIRouter(include_in_schema=False)
PAGE = "index.html"
CONTENT_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    # Asked for again every time, and answered with 304: a page of another version must not mix with ours.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page."""

    content: bytes
    headers: dict[str, str]


def _load(folder: Traversable, prefix: str = "") -> dict[str, Asset]:
    """Return the files below a folder by their paths; other kinds of file, such as licences, are left out."""
    found: dict[str, Asset] = {}
    for entry in folder.iterdir():
        kind = CONTENT_TYPES.get(entry.name.rpartition(".")[2])
        if entry.is_dir():
            found |= _load(entry, f"{prefix}{entry.name}/")
        elif kind is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[prefix + entry.name] = Asset(content, {**HEADERS, "Content-Type": kind, "ETag": etag})
    return found


ASSETS = _load(resources.files("dape_server") / "web")


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """Return the page."""
    return _answer(ASSETS[PAGE], request)


@router.api_route("/assets/{path:path}", methods=["GET", "HEAD"])
async def asset(path: str, request: Request) -> Response:
    """Return one of the page's files."""
    if path not in ASSETS or path == PAGE:
        raise HttpError(404, "the page has no such file", code="not_found")
    return _answer(ASSETS[path], request)


def _answer(asset: Asset, request: Request) -> Response:
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if asset.headers["ETag"] in known:
        return Response(status_code=304, headers=asset.headers)
    return Response(asset.content, headers=asset.headers)
