"""The server under test: its model's name and how many tokens it makes of a text."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.request import Request as UrlRequest
from urllib.request import urlopen

from dape_engine.errors import SettingsError
from dape_load.workload import COMPLETIONS, PERPLEXITY, Sizes, Workload
from dape_server.load.client import Client, Request, UrlError

TIMEOUT_SECONDS = 30
SAMPLE_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Target:
    """A server that the load goes to."""

    url: str
    model: str
    tokens_per_character: float
    api_key: str | None = None
    score_route: str = PERPLEXITY
    pid: int | None = None
    """Of its process, where that runs on this machine."""

    def workload(self, sizes: Sizes, seed: int) -> Workload:
        """Return requests for this server."""
        return Workload(self.model, sizes, self.tokens_per_character, seed, self.score_route)


def find_target(
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    score_route: str = PERPLEXITY,
    pid: int | None = None,
) -> Target:
    """Ask a server for its model, if none is named, and for the tokens of a sample text.

    Raises:
        SettingsError: there is no such server, or it does not answer as OpenAI's do.
    """
    url = url.rstrip("/")
    try:
        name = model or _get(f"{url}/v1/models", api_key)["data"][0]["id"]
        text = Workload(name, Sizes(), 1.0, seed=0).text(SAMPLE_CHARACTERS)
        body = {"model": name, "prompt": text, "max_tokens": 1}
        record = asyncio.run(_ask(url, api_key, Request("probe", COMPLETIONS, body)))
    except (OSError, ValueError, LookupError, TypeError, UrlError) as error:
        raise SettingsError(f"--host {url}: no server answers there as OpenAI's do: {error}") from error
    if not record.succeeded or not record.prompt_tokens:
        raise SettingsError(f"--host {url}: cannot complete a sample text: {record.error or record.status}")
    return Target(url, name, record.prompt_tokens / len(text), api_key, score_route, pid)


async def _ask(url: str, api_key: str | None, request: Request) -> Any:
    async with Client(url, api_key) as client:
        return await client.post(request)


def _get(url: str, api_key: str | None) -> Any:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with urlopen(UrlRequest(url, headers=headers), timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)
