"""YaRN: the frequencies by hand, and a RoPE model stretched when it is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from dape_engine.config import ModelConfig, PositionConfig
from dape_engine.encoding import Rotary
from dape_engine.errors import SettingsError
from dape_engine.inspection import InspectionRequest
from dape_engine.request import Window
from dape_engine.weights import load_config, save_model_folder
from dape_server.cli import cli
from dape_training.data import train_tokenizer
from engines import engine_of, score, tokens
from models import DAPE_KERPLE, TEXT, plain_logprobs, random_model, write_model

CPU = torch.device("cpu")


def test_slow_turns_are_stretched_and_fast_ones_kept() -> None:
    """Each frequency by the rule of the paper, with 512 tokens, head size 64 and factor 8."""
    rotary = Rotary(PositionConfig(kind="rope", yarn_factor=8), 64, train_length=512)
    for t, period in enumerate(rotary.periods(CPU).tolist()):
        theta = 10000 ** (-2 * t / 64)
        turns = 512 * theta / (2 * math.pi)
        kept = min(max((turns - 1) / 31, 0), 1)
        assert 1 / period == pytest.approx((1 - kept) * theta / 8 + kept * theta, rel=1e-5)
    plain = Rotary(PositionConfig(kind="rope"), 64, train_length=512).periods(CPU)
    stretch = rotary.periods(CPU) / plain
    assert stretch[0] == 1
    assert stretch[-1] == pytest.approx(8)
    assert ((stretch > 1) & (stretch < 8)).any()


def test_scores_grow_with_the_factor() -> None:
    query, key = torch.randn(2, 1, 1, 8).unbind(0)
    rotary = Rotary(PositionConfig(kind="rope", yarn_factor=16), 8, train_length=64)
    turned, other = rotary(query[None], key[None], torch.zeros(1, dtype=torch.int64))
    factor = (0.1 * math.log(16) + 1) ** 2
    assert float((turned * other).sum()) == pytest.approx(factor * float((query * key).sum()), rel=1e-5)


async def test_a_trained_model_is_stretched_when_it_is_loaded(tmp_path: Path) -> None:
    """As if its folder said so; the folder itself stays as it was, and inspections see the same model."""
    folder = write_model(tmp_path / "plain", position={"kind": "rope"}, dape={"width": 8})
    before = (folder / "config.json").read_bytes()
    config = load_config(folder).model_dump(exclude_unset=True)
    config["position"]["yarn_factor"] = 4.0
    said = tmp_path / "said"
    save_model_folder(said, random_model(config), train_tokenizer(TEXT, 300))
    ids = tokens(1, 120)
    window = Window(0, len(ids), 1)
    async with engine_of(folder, yarn_factor=4.0) as engine:
        (stretched,) = await score(engine, ids, window)
        await engine.inspect(InspectionRequest("i", ids, 100, (0,), (0,)))
    async with engine_of(folder) as engine:
        (plain,) = await score(engine, ids, window)
    expected = plain_logprobs(said, ids)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    assert stretched == pytest.approx(expected, abs=1e-4)
    assert plain != pytest.approx(expected, abs=1e-2)
    assert (folder / "config.json").read_bytes() == before


def test_a_model_without_rope_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, **DAPE_KERPLE)
    with pytest.raises(SettingsError, match=r"yarn_factor: .* kind 'kerple'; YaRN needs 'rope'"):
        load_config(folder, 4.0)
    result = CliRunner().invoke(cli, ["generate", str(folder), "a", "--yarn-factor", "4"])
    assert isinstance(result.exception, SettingsError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": {"kind": "alibi", "yarn_factor": 2}}, "yarn_factor is a setting of kind 'rope'"),
        ({"position": {"kind": "rope", "yarn_factor": 0.5}}, "greater than or equal to 1"),
        (
            {"position": {"kind": "alibi", "segment_tokens": [1]}},
            "a setting of kind 'bipe', got",
        ),
        (
            {"position": {"kind": "bipe", "segment_tokens": [99]}},
            "99 is not below vocab_size 50",
        ),
        (
            {"position": {"kind": "rope"}, "dape": {"form": "bias_only"}},
            "'bias_only' needs a bias, which position.kind 'rope' does not have",
        ),
        (
            {"position": {"kind": "t5"}, "dape": {"form": "score_only"}},
            "'score_only' makes no use of the bias of position.kind 't5'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "train_length": 8,
        "max_model_len": 8,
    }
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({**sizes, **settings})
