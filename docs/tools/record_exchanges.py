"""Record docs/tools/exchanges.json: a request to every route and its answer by the shipped model.

Run it, then generate_reference.py. The shipped model has no chat template, so the chat is answered by a copy
that has one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_server.app import create_app
from dape_server.metrics import Metrics
from dape_server.settings import ServerSettings

EXCHANGES = Path(__file__).with_name("exchanges.json")
MODEL = {"model": DEFAULT_MODEL}
PROMPT = {**MODEL, "prompt": "It was a dark and", "temperature": 0}
CHAT = "/v1/chat/completions"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
REQUESTS: list[tuple[str, str, str, Any]] = [
    ("POST", "/v1/completions", "/v1/completions", {**PROMPT, "max_tokens": 8, "logprobs": 1}),
    ("POST", "/v1/completions", "/v1/completions", {**PROMPT, "max_tokens": 2, "stream": True}),
    ("POST", CHAT, CHAT, {"messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 8}),
    (
        *("POST", "/v1/perplexity", "/v1/perplexity"),
        {**MODEL, "input": "It was the best of times, it was the worst of times.", "lengths": [4, 8]},
    ),
    (
        *("POST", "/v1/attention_bias", "/v1/attention_bias"),
        {**MODEL, "input": "The cat sat on the mat", "layers": [5], "heads": [0, 1]},
    ),
    ("GET", "/v1/models", "/v1/models", None),
    ("GET", f"/v1/models/{DEFAULT_MODEL}", "/v1/models/{name}", None),
    ("POST", "/tokenize", "/tokenize", {"prompt": "It was a dark and", "return_token_strs": True}),
    ("POST", "/detokenize", "/detokenize", {"tokens": [328, 317]}),
    *(("GET", path, path, None) for path in ("/tokenizer_info", "/health", "/ready", "/version")),
    ("GET", "/metrics", "/metrics", None),
]
SHOWN_METRICS = ("dape:prompt_tokens_total", "dape:num_requests_running")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        talker = Path(name) / "my-chat-model"
        shutil.copytree(resolve_model(DEFAULT_MODEL), talker)
        (talker / "chat_template.jinja").write_text(TEMPLATE)
        found = [
            *record(resolve_model(DEFAULT_MODEL), [r for r in REQUESTS if r[1] != CHAT]),
            *record(talker, [r for r in REQUESTS if r[1] == CHAT]),
        ]
    EXCHANGES.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def record(folder: Path, requests: list[tuple[str, str, str, Any]]) -> list[dict[str, Any]]:
    """Return the requests with their answers by one model."""
    metrics = Metrics(folder.name)
    app = create_app(
        AsyncEngine(folder, EngineOptions(kv_cache_memory="64MiB"), metrics), ServerSettings(), metrics
    )
    found = []
    with TestClient(app) as client:
        for method, path, template, body in requests:
            answer = client.request(method, path, json=body)
            if answer.status_code != 200:
                raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text}")
            is_json = answer.headers["content-type"].startswith("application/json")
            shown = rounded(answer.json()) if is_json else answer.text
            if path == "/metrics":
                shown = "\n".join(
                    line
                    for line in shown.splitlines()
                    if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(SHOWN_METRICS)
                )
            found.append(
                {"method": method, "path": path, "template": template, "body": body, "answer": shown}
            )
    return found


def rounded(value: Any) -> Any:
    """Return parsed JSON with four digits behind the point."""
    match value:
        case float():
            return round(value, 4)
        case list():
            return [rounded(part) for part in value]
        case dict():
            return {key: rounded(part) for key, part in value.items()}
    return value


if __name__ == "__main__":
    main()
