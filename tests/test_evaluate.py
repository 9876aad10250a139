"""Evaluation by context length: the same targets at every length, and honest errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dape_engine.engine import AsyncEngine
from dape_engine.errors import RequestError
from dape_engine.options import EngineOptions
from dape_engine.request import ScoreRequest, Window
from dape_engine.scoring import covering
from dape_training.evaluate import choose_ends, evaluate_lengths
from models import write_model


@pytest.mark.parametrize("length", [2, 16, 33, 255, 256, 257, 700])
def test_windows_of_any_length_cover_the_same_targets_once(length: int) -> None:
    windows = covering(1000, length, 256)
    targets = [t for window in windows for t in range(window.score_from, window.end)]
    assert sorted(targets) == list(range(744, 1000))
    assert {window.end - window.start for window in windows} == {length}
    assert len(windows) == math.ceil(256 / min(256, length - 1))


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(RequestError, match="100 tokens are too few for length 128"):
        covering(100, 128, 64)


def test_ends_are_spread_over_a_document() -> None:
    assert choose_ends(1000, 400, 3) == [600, 800, 1000]
    assert choose_ends(400, 400, 3) == [400]
    assert choose_ends(399, 400, 3) == []


async def test_means_and_paired_changes_are_those_of_the_windows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 300, (150,), generator=generator).tolist() for _ in range(3)]
    engine = AsyncEngine(write_model(tmp_path), EngineOptions(kv_cache_memory=1 << 20))
    engine.start()
    results = await evaluate_lengths(engine, documents, [128, 32], ends_per_document=1, score_last=16)
    again = await evaluate_lengths(
        engine, documents, [128, 32], ends_per_document=1, score_last=16, change_from=128
    )
    expected: dict[int, list[float]] = {32: [], 128: []}
    for length, values in expected.items():
        for document in documents:
            window = Window(150 - length, 150, 134)
            request = ScoreRequest("x", tuple(document), (window,))
            [scores] = [scores async for scores in engine.score(request)]
            values.append(-sum(scores.logprobs) / 16)
    await engine.shutdown(0)
    short, long = (torch.tensor(values, dtype=torch.float64) for values in expected.values())
    assert [row.length for row in results] == [32, 128]
    assert [row.num_scored for row in results] == [48, 48]
    assert results[1].mean_nll == pytest.approx(float(long.mean()), abs=1e-5)
    error = float(long.std() / math.sqrt(3))
    assert results[1].stderr == pytest.approx(error * results[1].perplexity, rel=1e-3)
    assert [row.change_from for row in results] == [32, 32]
    assert results[1].change == pytest.approx(float((long - short).mean()), abs=1e-5)
    assert (again[0].change_from, again[1].change) == (128, 0)
    assert again[0].change == pytest.approx(-results[1].change, abs=1e-5)
    assert results[1].change_stderr == pytest.approx(float((long - short).std() / math.sqrt(3)), abs=1e-5)
