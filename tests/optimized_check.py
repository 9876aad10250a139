"""Checks that hold when Python drops every `assert`: run as `python -O tests/optimized_check.py`.

pytest's own checks are asserts and would vanish as well, hence a script that raises. It looks at what may
depend on an assert: refusals of bad input, the server's answers, and the numbers of the kernels.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from starlette.testclient import TestClient

from dape_engine.engine import AsyncEngine
from dape_engine.errors import ModelFolderError
from dape_engine.loading import load_model
from dape_engine.options import EngineOptions
from dape_kernels.reference import reference_attention
from dape_server.app import create_app
from dape_server.settings import ServerSettings
from golden import Golden
from models import plain_logprobs, write_model

GOLDEN = Path(__file__).parent / "data/golden"
IDS = [5, 6, 7, 8, 9, 10, 11, 12]
REFUSED: list[tuple[str, Any, int]] = [
    ("/v1/completions", {"prompt": []}, 400),
    ("/v1/completions", {"prompt": ""}, 400),
    ("/v1/completions", {"prompt": [-1]}, 400),
    ("/v1/completions", {"prompt": [304]}, 400),
    ("/v1/completions", {"prompt": [5], "max_tokens": -1}, 400),
    ("/v1/completions", {"prompt": [5], "max_tokens": 512}, 400),
    ("/v1/completions", {"prompt": [5], "max_tokens": 1, "min_tokens": 2}, 400),
    ("/v1/completions", {"prompt": [5], "temperature": -1}, 400),
    ("/v1/completions", {"prompt": [5], "n": 1000}, 400),
    ("/v1/completions", {"prompt": [5], "stop_token_ids": [9999]}, 400),
    ("/v1/completions", {"prompt": [5], "logit_bias": {"9999": 1}}, 400),
    ("/v1/completions", {"prompt": [5], "unknown": 1}, 400),
    ("/v1/completions", {"prompt": [5], "model": "other"}, 404),
    ("/v1/perplexity", {"input": [5]}, 400),
    ("/v1/perplexity", {"input": IDS, "window": "sliding", "context_length": 4, "stride": 9}, 400),
    ("/v1/perplexity", {"input": IDS, "lengths": [9]}, 400),
    ("/detokenize", {"tokens": [304]}, 400),
    ("/nowhere", {}, 404),
]


def check(true: object, what: object) -> None:
    """Raise where an assert would have."""
    if not true:
        raise SystemExit(f"does not hold: {what}")


def check_server(folder: Path) -> None:
    """Check refusals and answers of a server with a real engine."""
    engine = AsyncEngine(folder, EngineOptions(kv_cache_memory=1 << 20))
    with TestClient(create_app(engine, ServerSettings())) as client:
        for path, body, status in REFUSED:
            answer = client.post(path, json=body)
            check(answer.status_code == status, (path, body, answer.status_code, answer.text))
            check(answer.json()["error"]["message"], answer.text)
        answer = client.post("/v1/perplexity", json={"input": IDS}).json()
        rows = plain_logprobs(folder, IDS[:-1]).gather(1, torch.tensor(IDS[1:])[:, None])
        check(math.isclose(answer["data"][0]["nll_sum"], -float(rows.sum()), rel_tol=1e-4), answer)
        body = {"prompt": IDS, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json={**body, "return_token_ids": True}).json()
        tokens = list(IDS)
        for _ in range(4):
            tokens.append(int(plain_logprobs(folder, tokens)[-1].argmax()))
        check(answer["choices"][0]["token_ids"] == tokens[len(IDS) :], answer)
        check(engine.state().free_blocks == engine.num_blocks, engine.state())
    check(engine.state().failure is None, engine.state())


def check_damage(folder: Path) -> None:
    """Check that a damaged model folder is refused."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": 5}))
    try:
        load_model(folder, torch.float32, torch.device("cpu"))
    except ModelFolderError:
        return
    raise SystemExit("a damaged model folder was loaded")


def check_golden(path: Path) -> None:
    """Check the reference attention against one golden file."""
    golden = Golden.load(path)
    query, key, value = golden.inputs(torch.float64)
    output = reference_attention(query, key, value, golden.encoding(torch.float64))
    expected = golden.tensors["out"].double()
    check(torch.allclose(output, expected, atol=1e-4), path)


def main() -> None:
    check(sys.flags.optimize > 0, "asserts are off: run with `python -O`")
    for path in sorted(GOLDEN.glob("*.safetensors"))[:8]:
        check_golden(path)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny")
        check_server(model)
        check_damage(model)
    sys.stdout.write("all checks hold without asserts\n")


main()
