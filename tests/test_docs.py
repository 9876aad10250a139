"""README and docs/: what follows from the code is current, and links and commands are true."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema_rs
import pytest
import yaml

from dape_server.cli import cli
from fakes import serving
from generate_reference import DOCS, EXCHANGES, pages
from reference_routes import Exchange

REPOSITORY = DOCS.parent
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *DOCS.rglob("*.md")])
CODE_BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!\\)\[[^]\[]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)
PROGRAM = re.compile(r"^(?:\$ |    )?(?P<line>(?:\w+=\S+ )*dape (?:.*\\\n)*.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def written() -> Iterator[dict[str, str]]:
    """The generated pages as they should be."""
    with serving() as client:
        yield pages(client.app)


@pytest.mark.parametrize("name", ["routes.md", "commands.md", "observability.md"])
def test_generated_pages_are_current(written: dict[str, str], name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == written[name], "run docs/tools/generate_reference.py"


def test_every_route_has_an_exchange_of_the_shape_that_it_promises() -> None:
    exchanges = Exchange.read(EXCHANGES.read_text(encoding="utf-8"))
    with serving() as client:
        description = client.app.openapi()
    operations = {
        (method.upper(), path): operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }
    assert {(exchange.method, exchange.template) for exchange in exchanges} == operations.keys()
    components = {"components": description["components"]}
    for exchange in exchanges:
        operation = operations[exchange.method, exchange.template]
        content = operation["responses"]["200"]["content"]
        kind = "text/plain" if exchange.path == "/metrics" else "application/json"
        if isinstance(exchange.answer, str) and exchange.answer.startswith("data: "):
            kind = "text/event-stream"
        checked = [(content[kind]["schema"], exchange.answer)]
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            checked.append((schema, exchange.body))
        for schema, value in checked:
            jsonschema_rs.validate({**schema, **components}, value)


def prose(path: Path) -> str:
    """A page without its blocks of code, which hold no links."""
    return CODE_BLOCK.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found: set[str] = set()
    for heading in HEADING.finditer(prose(path)):
        text = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading["text"]).lower()
        found.add(re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(prose(page)):
        target, _, anchor = link["target"].partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.is_relative_to(REPOSITORY), f"{link[0]} leads out of the repository"
        assert path.exists(), f"{link[0]}: no such file"
        if anchor:
            assert anchor in anchors(path), f"{link[0]}: no such heading"


def test_every_page_is_in_the_navigation_once() -> None:
    class Loader(yaml.SafeLoader):
        """Takes the names of functions in mkdocs.yml for nothing."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    settings = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def names(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry if isinstance(entry, list) else entry.values():
                yield from names(part)

    assert sorted(names(settings["nav"])) == sorted(
        str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")
    )


def documented_commands() -> Iterator[tuple[str, str]]:
    """The lines of all pages that call `dape`, with their pages."""
    for page in PAGES:
        if page.name not in ("CHANGELOG.md", "commands.md"):
            for line in PROGRAM.finditer(page.read_text(encoding="utf-8")):
                yield page.name, line["line"]


def test_commands_have_the_options_that_pages_give_them() -> None:
    checked = 0
    for page, line in documented_commands():
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        words = words[next(i for i, word in enumerate(words) if word == "dape") + 1 :]
        command, context = cli, click.Context(cli)
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            name = words.pop(0)
            found = command.get_command(context, name)
            assert found is not None, f"{page}: {line}"
            command = found
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        for word in words:
            if word.startswith("--") and word not in ("--help", "--version"):
                assert word.strip("[]").partition("=")[0] in options, f"{page}: {word} in {line}"
                checked += 1
    assert checked > 30
