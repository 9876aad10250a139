"""docs/limits.md is a contract: its numbers are those of the code, and its statuses those of the server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dape_engine.options import EngineOptions
from dape_server import limits
from dape_server.settings import ServerSettings
from fakes import COMPLETIONS, JSON, FakeEngine, serving

PAGE = (Path(__file__).parents[1] / "docs/limits.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| `\w+` \|", line)
]
LIMITS = {row[0].strip("`"): row[1:] for row in ROWS}
SPOKEN_OF = {"REQUEST_ID", "RETRY_SECONDS", "LEAST_SENT_BYTES", "MAX_DISCARDED_BYTES"}
"""Constants that are no bound of their own; the last two stand in the text."""


def settings_with_bounds() -> dict[str, Any]:
    fields = {**ServerSettings.model_fields, **EngineOptions.model_fields}
    return {name: field.default for name, field in fields.items() if re.match(r"max_|\w+_timeout", name)}


def test_every_limit_is_on_the_page():
    constants = {name for name in vars(limits) if name.isupper()} - SPOKEN_OF
    assert constants == {name for name in LIMITS if name.isupper()}
    for name in (*settings_with_bounds(), "LEAST_SENT_BYTES", "MAX_DISCARDED_BYTES"):
        assert f"`{name}`" in PAGE or name == "health_timeout", name


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "max_model_len"])
def test_the_page_has_the_numbers_of_the_code(name):
    value = getattr(limits, name) if name.isupper() else settings_with_bounds()[name]
    assert float(LIMITS[name][0]) == value


OVER: dict[str, Callable[[int], dict[str, Any]]] = {
    "MAX_PROMPTS": lambda count: {"prompt": ["the"] * count},
    "MAX_COMPLETIONS": lambda count: {"n": count},
    "MAX_STOP": lambda count: {"stop": ["x"] * count},
    "MAX_STOP_CHARS": lambda count: {"stop": "x" * count},
    "MAX_STOP_TOKEN_IDS": lambda count: {"stop_token_ids": [5] * count},
    "MAX_LOGIT_BIAS": lambda count: {"logit_bias": {str(token): 1 for token in range(count)}},
    "MAX_ALLOWED_TOKEN_IDS": lambda count: {"allowed_token_ids": [5] * count},
    "MAX_LOGPROB_TOKEN_IDS": lambda count: {"logprobs": 1, "logprob_token_ids": [5] * count},
    "MAX_BAD_WORDS": lambda count: {"bad_words": ["x"] * count},
    "MAX_BAD_WORD_CHARS": lambda count: {"bad_words": ["x" * count]},
    "MAX_LOGPROBS": lambda count: {"logprobs": count},
    "MAX_USER_CHARS": lambda count: {"user": "x" * count},
    "MAX_CACHE_SALT_CHARS": lambda count: {"cache_salt": "x" * count},
    "MAX_INT": lambda count: {"max_tokens": count},
    "MAX_SECONDS": lambda count: {"timeout": count},
}
"""What makes a right body of completions wrong by a count."""


@pytest.fixture(scope="module")
def client():
    with serving(FakeEngine()) as client:
        yield client


@pytest.mark.parametrize("name", OVER)
def test_one_above_a_limit_is_refused_as_the_page_says(client, name):
    body = {"prompt": "the", "max_tokens": 1, **OVER[name](getattr(limits, name) + 1)}
    answer = client.post(COMPLETIONS, content=json.dumps(body), headers=JSON)
    _, _, status, code = LIMITS[name]
    error = answer.json()["error"]
    assert (answer.status_code, f"`{error['code']}`") == (int(status), code), answer.text
    assert str(getattr(limits, name)) in error["message"]
    assert len(answer.text) < 1000
    assert client.engine.free_blocks == client.engine.num_blocks


def test_what_may_be_tried_again_says_when():
    with serving(FakeEngine(max_num_queued_reqs=1)) as client:
        client.engine.active["somebody"] = 1
        full = client.post(COMPLETIONS, json={"prompt": "the"})
        client.app.state.context.lifecycle.drain()
        draining = client.post(COMPLETIONS, json={"prompt": "the"})
    assert (full.status_code, draining.status_code) == (429, 503)
    assert int(full.headers["retry-after"]) > 0
    assert int(draining.headers["retry-after"]) > 0
