"""GET / and its assets: complete, from this server alone, guarded by a strict policy, free of data."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from dape_server.routes.playground import ASSETS
from fakes import serving

WEB = Path(__file__).parents[1] / "server/dape_server/web"
OURS = sorted(name for name in ASSETS if not name.startswith("vendor/"))
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with serving() as client:
        yield client


def url_of(name: str) -> str:
    return "/" if name == "index.html" else f"/assets/{name}"


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_every_file_is_served_with_its_type_and_policy(client: TestClient, name: str) -> None:
    answer = client.get(url_of(name))
    assert answer.status_code == 200
    assert answer.content == (WEB / name).read_bytes()
    assert answer.headers["content-type"] == TYPES[Path(name).suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_page_is_whole() -> None:
    """All that lies in the folder is served, but for licences and notes."""
    files = {path.relative_to(WEB).as_posix() for path in WEB.rglob("*") if path.is_file()}
    assert files - set(ASSETS) == {"vendor/uplot/LICENSE", "vendor/uplot/README.md"}
    assert "Permission is hereby granted" in (WEB / "vendor/uplot/LICENSE").read_text()


def test_unchanged_files_are_not_sent_again(client: TestClient) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_has_no_body(client: TestClient) -> None:
    for path in ("/", "/assets/app.js"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(client.get(path).content))


@pytest.mark.parametrize(
    "path",
    [
        "/assets/",
        "/assets/index.html",
        "/assets/nothing.js",
        "/assets/vendor/uplot/LICENSE",
        "/assets/vendor/uplot",
        "/assets/../app.py",
        "/assets/%2e%2e/app.py",
        "/assets/..%2fapp.py",
        "/assets//etc/passwd",
        "/assets/%00",
        "/assets/style.css/",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_posting_to_the_page_is_refused(client: TestClient) -> None:
    assert client.post("/", json={}).status_code == 405


def test_page_needs_the_key_as_everything_else_does() -> None:
    with serving(api_key=["secret-key"]) as client:
        for name in ("index.html", *OURS):
            assert client.get(url_of(name)).status_code == 401
            assert client.get(url_of(name), auth=("", "secret-key")).status_code == 200


def test_page_is_no_part_of_the_api(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert "/v1/attention_bias" in paths
    assert not {"/", "/assets/{path}"} & set(paths)


@pytest.mark.parametrize("name", OURS)
def test_nothing_comes_from_elsewhere(name: str) -> None:
    text = (WEB / name).read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|(?:src|href|url\(|from)[=\s]*[\"']//", text)
    assert "innerHTML" not in text  # text of models and users never becomes markup
    assert not re.search(r"\beval\(|new Function|document\.write", text)


def test_vendored_library_loads_nothing() -> None:
    for name in ASSETS.keys() - set(OURS):
        text = (WEB / name).read_text()
        assert not re.search(r"fetch\(|XMLHttpRequest|import\s|@import|url\(|\beval\(|new Function", text)


def test_markup_holds_no_inline_code_and_links_to_what_exists() -> None:
    page = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=", page)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    assert scripts
    assert all("src=" in attributes and not body for attributes, body in scripts)
    linked = re.findall(r'(?:src|href)="assets/([^"]+)"', page)
    assert linked
    assert set(linked) <= set(ASSETS)
    imported = {
        name
        for file in WEB.glob("*.js")
        for name in re.findall(r'(?:from|import) "\./(.+?)"', file.read_text())
    }
    assert imported <= set(ASSETS)


def test_every_control_has_a_label() -> None:
    page = (WEB / "index.html").read_text()
    for tag in re.findall(r"<(?:input|select|textarea)[^>]*>", page):
        name = re.search(r'id="([^"]+)"', tag)
        assert name is not None, tag
        assert "aria-label=" in tag or f'for="{name[1]}"' in page, tag
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_files_are_part_of_the_package() -> None:
    settings = tomllib.loads((WEB.parents[2] / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "server/dape_server" in wheel["packages"]
    assert not {"exclude", "include", "only-include"} & set(wheel)
