"""lm-eval's `local-completions` against the server: its numbers are those of /v1/perplexity."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
]
SCRIPT = Path(__file__).with_name("evaluate.py")
QUESTIONS: list[dict[str, Any]] = [
    # The second choice is the model's own continuation.
    {"question": "It was a dark and stormy", "choices": [" night", " day", " elephant in"], "answer": 0},
    {"question": "He opened the door and went", "choices": [" in", " blue", " seventeen"], "answer": 0},
    {"question": "She said nothing. “Naïve”,", "choices": [" he said", " the", " 🙂 of"], "answer": 0},
]
TEXTS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little money in my purse.",
    "The old man looked at the “naïve” boy.\n\nThen he laughed 🙂.",
]
STARTS = ["It was the best of times, it was the", "Once upon a time there was", "The captain of the ship"]
TASKS = ["choice", "rolling", "until"]
TASK_FILES = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "until": """
task: until
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/until.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
WINDOW = 40
"""Length of the model in one case, so that rolling needs several windows for a text."""


@pytest.fixture(scope="module")
def outcomes(url: str, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, run in one process because importing lm-eval takes as long as the rest."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = {
        "choice": QUESTIONS,
        "rolling": [{"text": t} for t in TEXTS],
        "until": [{"text": s} for s in STARTS],
    }
    for name, entries in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        (folder / f"{name}.yaml").write_text(TASK_FILES[name].replace("FOLDER", str(folder)))
    base = {"base_url": f"{url}/v1/completions", "model": model_folder.name, "max_length": 2048}
    cases = {
        "remote": {"model": base, "batch_size": 1},
        "remote, concurrent": {"model": {**base, "num_concurrent": 4}, "batch_size": 2},
        "remote, texts": {"model": {**base, "tokenized_requests": False}, "batch_size": 1},
        "windows": {"model": {**base, "max_length": WINDOW}, "batch_size": 1, "tasks": ["rolling"]},
    }
    if importlib.util.find_spec("transformers") is not None:
        local = {**base, "tokenizer": str(model_folder), "tokenizer_backend": "huggingface"}
        cases["local"] = {"model": local, "batch_size": 1}
        texts = {**local, "tokenized_requests": False, "num_concurrent": 4}
        cases["local, texts, concurrent"] = {"model": texts, "batch_size": 2}
    wanted, results = folder / "cases.json", folder / "results.json"
    wanted.write_text(json.dumps({name: {"tasks": TASKS, **case} for name, case in cases.items()}))
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), str(wanted), str(results)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(results.read_text())
    assert found.keys() == cases.keys()
    return found


CASES = ["remote", "remote, concurrent", "remote, texts", "local", "local, texts, concurrent"]


@pytest.fixture(params=CASES)
def outcome(request: pytest.FixtureRequest, outcomes: dict[str, Any]) -> dict[str, Any]:
    if request.param not in outcomes:
        pytest.skip("transformers is not installed")
    found: dict[str, Any] = outcomes[request.param]
    return found


def ids_of(http: httpx.Client, text: str) -> list[int]:
    ids: list[int] = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()[
        "tokens"
    ]
    return ids


def logprobs(http: httpx.Client, ids: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first."""
    answer = http.post("/v1/perplexity", json={"input": ids, "return_token_logprobs": True, "bos": "never"})
    values: list[float] = answer.json()["data"][0]["token_logprobs"][1:]
    return values


def samples(outcome: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(outcome["samples"][task], key=lambda s: s["doc_id"])]


def test_loglikelihoods_of_choices(outcome: dict[str, Any], http: httpx.Client) -> None:
    right = 0
    for question, answers in zip(QUESTIONS, samples(outcome, "choice"), strict=True):
        context = ids_of(http, question["question"])
        expected = []
        for choice in question["choices"]:
            ids = ids_of(http, question["question"] + choice)
            expected.append(sum(logprobs(http, ids)[len(context) - 1 :]))
        assert [float(answer[0]) for answer in answers] == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == question["answer"]
    assert outcome["results"]["choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


def test_greedy_is_told_from_the_same_numbers(outcome: dict[str, Any], http: httpx.Client) -> None:
    flags = []
    for question, answers in zip(QUESTIONS, samples(outcome, "choice"), strict=True):
        body = {"prompt": question["question"], "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        drawn = http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
        context = ids_of(http, question["question"])
        for choice, answer in zip(question["choices"], answers, strict=True):
            own = ids_of(http, question["question"] + choice)[len(context) :]
            flags.append(str(answer[1]) == "True")
            assert flags[-1] == (own == drawn[: len(own)])
    assert {True, False} == set(flags)


def test_rolling_loglikelihoods_are_those_of_perplexity(outcome: dict[str, Any], http: httpx.Client) -> None:
    bos = ids_of(http, "<|endoftext|>")
    assert len(bos) == 1
    total = 0.0
    for text, answer in zip(TEXTS, samples(outcome, "rolling"), strict=True):
        expected = sum(logprobs(http, bos + ids_of(http, text)))
        assert float(answer[0]) == pytest.approx(expected, abs=1e-4)
        total += expected
    characters = sum(len(text.encode()) for text in TEXTS)
    perplexity = outcome["results"]["rolling"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-total / characters), rel=1e-4)


def test_rolling_in_windows_is_the_disjoint_perplexity(outcomes: dict[str, Any], http: httpx.Client) -> None:
    bos = ids_of(http, "<|endoftext|>")
    for text, answer in zip(TEXTS, samples(outcomes["windows"], "rolling"), strict=True):
        body = {
            "input": bos + ids_of(http, text),
            "bos": "never",
            "window": "disjoint",
            "context_length": WINDOW - 1,
        }
        [entry] = http.post("/v1/perplexity", json=body).json()["data"]
        assert float(answer[0]) == pytest.approx(-entry["nll_sum"], abs=1e-4)


def test_generation_until_a_stop_string(outcome: dict[str, Any], http: httpx.Client) -> None:
    for start, answer in zip(STARTS, samples(outcome, "until"), strict=True):
        body = {"prompt": start, "max_tokens": 12, "temperature": 0, "stop": [".", "<|endoftext|>"]}
        text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert text
        assert answer[0] == text
