"""Speculative decoding as clients and operators ask for it: the field, the flag, streams and metrics."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_engine.request import StepStats
from dape_engine.speculation import RowCosts, SpeculativeConfig
from dape_server.cli import cli
from dape_server.metrics import Metrics
from engines import HttpEngine
from fakes import CANARY, COMPLETIONS, check_refused, serving
from live import live, request
from models import write_model

CONFIG = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def test_the_field_reaches_the_engine() -> None:
    with serving() as client:
        for given in (CONFIG, {"num_speculative_tokens": 0}, {}):
            body = {"prompt": "the", "max_tokens": 1, "speculative_config": given}
            assert client.post(COMPLETIONS, json=body).status_code == 200
            assert client.engine.requests[-1].speculation == SpeculativeConfig(**given)
        client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": 1})
        assert client.engine.requests[-1].speculation is None


@pytest.mark.parametrize(
    ("given", "place", "says"),
    [
        ({"num_speculative_tokens": 17}, ".num_speculative_tokens", "16, got 17"),
        ({"num_speculative_tokens": True}, ".num_speculative_tokens", "integer"),
        ({"prompt_lookup_min": 0}, ".prompt_lookup_min", "1, got 0"),
        ({"prompt_lookup_min": 7}, "", "prompt_lookup_max 5 is below prompt_lookup_min 7"),
        ({"method": "eagle"}, ".method", "'ngram'"),
        ({"model": CANARY}, ".model", "unknown field"),
        (4, "", "speculative_config"),
    ],
)
def test_wrong_values_are_refused_by_name(given: object, place: str, says: str) -> None:
    with serving() as client:
        body = {"prompt": "the", "speculative_config": given}
        check_refused(client, COMPLETIONS, body, "speculative_config" + place, says=says)


async def test_a_stream_has_one_event_for_each_token_and_the_text_of_plain_decoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are free, so that all that is proposed is verified."""
    monkeypatch.setattr(RowCosts, "seconds", lambda *_: 1.0)
    metrics = Metrics("m")
    engine = HttpEngine(folder, EngineOptions(kv_cache_memory=1 << 20, block_size=4), metrics)
    body = {"prompt": [7, 8, 9] * 9, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 2}
    async with live(engine) as server:

        async def ask(**more: object) -> bytes:
            answer = await server.ask(request("POST", COMPLETIONS, json.dumps({**body, **more}).encode()))
            assert answer.status == 200, answer.body
            return answer.body

        plain = json.loads(await ask())["choices"][0]
        whole = json.loads(await ask(speculative_config=CONFIG))["choices"][0]
        events = [
            json.loads(line.removeprefix(b"data: "))["choices"][0]
            for line in (await ask(speculative_config=CONFIG, stream=True)).split(b"\n\n")
            if line.startswith(b"data: {")
        ]
        threes = (await ask(speculative_config=CONFIG, stream=True, stream_interval=3)).count(b"data: {")
    assert whole["text"] == plain["text"] == "".join(event["text"] for event in events)
    assert len(events) == 40
    assert threes == 14
    for field in ("tokens", "text_offset"):
        assert whole["logprobs"][field] == plain["logprobs"][field]
        assert [event["logprobs"][field][0] for event in events] == plain["logprobs"][field]
    assert whole["logprobs"]["token_logprobs"] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-4)
    [accepted] = re.findall(r"num_accepted_tokens_total{.*} (\S+)", metrics.exposition().decode())
    assert float(accepted) > 20


def test_metrics_count_proposals_and_where_they_end() -> None:
    metrics = Metrics("m")
    metrics.on_step(StepStats(0.1, 9, 0, 5, 0, 0, 0, 0, drafts=((4, 2), (3, 0), (1, 1))))
    lines = metrics.exposition().decode().splitlines()
    found = {
        match[1] + (match[2] or ""): float(match[3])
        for line in lines
        if (match := re.fullmatch(r'dape:spec_decode_num_(\w+)_total{.*?(position="\d")?} (\S+)', line))
    }
    assert found == {
        "drafts": 3,
        "draft_tokens": 8,
        "accepted_tokens": 3,
        'accepted_tokens_per_posposition="0"': 2,
        'accepted_tokens_per_posposition="1"': 1,
    }


class TestFlag:
    def generate(self, folder: Path, *more: str) -> str:
        arguments = ("generate", str(folder), "It was", "--max-tokens", "9", "--temperature", "0", *more)
        small = ("--kv-cache-memory", "1MiB", "--threads", str(os.cpu_count()))
        result = CliRunner().invoke(cli, [*arguments, *small], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    def test_it_is_json_or_a_mapping_in_a_file(self, folder: Path, tmp_path: Path) -> None:
        file = tmp_path / "dape.yaml"
        file.write_text("speculative_config: {num_speculative_tokens: 3, prompt_lookup_max: 4}\n")
        plain = self.generate(folder)
        assert self.generate(folder, "--speculative-config", json.dumps(CONFIG)) == plain
        assert self.generate(folder, "--config", str(file)) == plain

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ('{"num_speculative_tokens": 99}', "--speculative-config 99: .* less than or equal to 16"),
            ('{"draft_model": "x"}', "--speculative-config x: Extra inputs"),
            ("ngram", "--speculative-config ngram: .*Expecting value"),
        ],
    )
    def test_mistakes_are_named(self, folder: Path, text: str, says: str) -> None:
        with pytest.raises(SettingsError, match=says):
            self.generate(folder, "--speculative-config", text)
