"""Background work takes as long as decoding does, and a refused client hears an honest time."""

from __future__ import annotations

import pytest

from dape_engine.pacing import (
    LONGEST_STEP,
    LONGEST_WAIT,
    NO_BOUND,
    READERS_RETURN,
    UNKNOWN_PAIRS,
    Pace,
)
from dape_engine.request import SamplingParams
from dape_engine.sequence import Sequence
from dape_engine.step import Chunk, pairs


def decoding() -> Chunk:
    sequence = Sequence("w", [1, 2, 3], SamplingParams(max_tokens=5))
    sequence.tokens.append(4)
    sequence.num_computed = 3
    return Chunk(sequence, 3, 1)


def prompt(count: int, start: int = 0) -> Chunk:
    return Chunk(Sequence("r", [1] * (start + count), SamplingParams()), start, count)


def scored(count: int) -> Chunk:
    return Chunk(Sequence("s", [1] * (count + 1), score_from=1, priority=1), 0, count)


def test_a_row_attends_to_itself_and_what_is_before() -> None:
    assert pairs(prompt(3, start=4)) == 5 + 6 + 7


def test_one_layer_of_background_work_takes_as_long_as_decoding() -> None:
    pace = Pace()
    assert (pace.background_pairs(6, 0.0), pace.layers(1000)) == ((UNKNOWN_PAIRS, NO_BOUND), 1)
    pace.observe([decoding(), decoding()], 0.004, 0.0)
    pace.learn(1000, 0.002)
    assert pace.background_pairs(6, 0.0)[0] == 12_000
    # 500 pairs a layer take 1 ms, 5000 take 10 ms.
    assert (pace.layers(500), pace.layers(5000)) == (4, 1)


def test_steps_without_readers_are_short_only_while_some_may_come() -> None:
    pace = Pace()
    pace.observe([scored(10)], 0.055, 5.0)
    assert pace.background_pairs(6, 5.0)[1] == NO_BOUND
    pace.observe([decoding()], 0.004, 7.0)
    assert pace.background_pairs(6, 7.0)[1] == pytest.approx(1000 * LONGEST_STEP, abs=1)
    assert pace.background_pairs(6, 7.0 + READERS_RETURN)[1] == NO_BOUND


def test_it_learns_slowly_and_only_from_steps_of_one_kind() -> None:
    pace = Pace()
    pace.observe([decoding()], 0.004, 0.0)
    pace.observe([prompt(10)], 55.0, 0.0)
    before = pace.background_pairs(1, 0.0)[0]
    pace.observe([decoding(), prompt(10)], 99.0, 0.0)
    assert pace.background_pairs(1, 0.0)[0] == before == 1
    for _ in range(100):
        pace.observe([prompt(10)], 0.055, 0.0)
    assert pace.background_pairs(1, 0.0)[0] == pytest.approx(4, abs=1)


def test_a_wait_is_half_of_what_the_queue_takes() -> None:
    pace = Pace()
    assert pace.wait(1000) == 1
    pace.note(100, 1.0)
    assert pace.wait(1000) == 5
    pace.note(1, 0.5)
    assert pace.wait(1000) == 8, "1.4 s for 91 rows"
    assert pace.wait(1) == 1
    assert pace.wait(10**9) == LONGEST_WAIT
