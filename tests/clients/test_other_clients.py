"""curl, OpenAI's package, locust and guidellm against the server, each as its users run it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from dape_engine.weights import DEFAULT_MODEL

pytestmark = pytest.mark.client
REPOSITORY = Path(__file__).parents[2]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
    )


def curl(*arguments: str) -> str:
    finished = run(["curl", "--silent", "--show-error", "--max-time", "60", *arguments])
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@needs_curl
def test_curl_streams(url: str) -> None:
    body = {"prompt": "It was", "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": True}
    events = curl("--no-buffer", f"{url}/v1/completions", "--json", json.dumps(body)).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    whole = json.loads(curl(f"{url}/v1/completions", "--json", json.dumps({**body, "stream": False})))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@needs_curl
@pytest.mark.parametrize(
    ("path", "content", "status", "param"),
    [
        ("/v1/completions", '{"prompt": "x", "max_tokens": -1}', 400, "max_tokens"),
        ("/v1/completions", '{"prompt": "x", "temprature": 1}', 400, "temprature"),
        ("/v1/completions", '{"prompt": ', 400, None),
        ("/v1/completions", '{"prompt": "x", "model": "other"}', 404, "model"),
        ("/v1/nothing", "{}", 404, None),
    ],
)
def test_curl_gets_errors(url: str, path: str, content: str, status: int, param: str | None) -> None:
    answer = curl(f"{url}{path}", "--json", content, "--write-out", "\n%{http_code}")
    body, _, code = answer.rpartition("\n")
    assert int(code) == status
    assert json.loads(body)["error"]["param"] == param


def test_the_openai_package(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == [DEFAULT_MODEL]
        settings: dict[str, Any] = {"model": DEFAULT_MODEL, "prompt": "It was", "temperature": 0}
        chunks = list(
            client.completions.create(
                **settings, max_tokens=6, stream=True, stream_options={"include_usage": True}
            )
        )
        whole = client.completions.create(**settings, max_tokens=6)
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(**settings, max_tokens=100_000)


@needs("locust")
def test_a_locust_scenario_fails_nothing_and_leaks_nothing(url: str, tmp_path: Path) -> None:
    figures, page = tmp_path / "abort.json", tmp_path / "abort.html"
    finished = run(
        [
            *(sys.executable, "load_tests/run.py", "--scenario", "abort", "--host", url),
            *("--users", "4", "--duration", "4", "--prompt-tokens", "40", "--output-tokens", "40"),
            *("--json", str(figures), "--html", str(page)),
        ]
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "TTFT: first streamed output - request sent" in finished.stdout
    result = json.loads(figures.read_text())["abort"]
    streams = result["figures"]["stream"]
    assert streams["failed"] == 0
    assert streams["hung_up"] >= 2
    assert streams["itl_ms"]["count"] >= 39
    assert result["extra"]["leaked_blocks"] == 0
    assert "first streamed output" in page.read_text()
    assert "TPOT" in (tmp_path / "abort-locust.html").read_text()


@needs("guidellm")
def test_guidellm(url: str, model_folder: Path, offline: dict[str, str], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    finished = run(
        [
            *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-progress"),
            *("--backend", f"kind=openai_http,target={url},request_format=/v1/completions"),
            *("--profile", "kind=constant,rate=5", "--constraint", "kind=max_requests,count=4"),
            *("--tokenizer", f"kind=huggingface_auto,model={model_folder}"),
            *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=6"),
            *("--output", f"kind=json,path={figures}"),
        ],
        offline,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    [benchmark] = json.loads(figures.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0)
    assert benchmark["metrics"]["output_token_count"]["successful"]["mean"] == 6
