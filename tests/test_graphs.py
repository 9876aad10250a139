"""Decode steps as captured graphs, with work that is simply done again in the place of a graph."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dape_engine.errors import SettingsError
from dape_engine.graphs import DecodeGraphs, batch_sizes
from dape_engine.memory import MIB, cache_memory, plan_memory
from dape_engine.options import EngineOptions
from dape_engine.request import SamplingParams
from dape_engine.sequence import Sequence
from dape_engine.step import Chunk
from dape_kernels.attention import BACKENDS
from dape_kernels.backend import Backend
from engines import drawn, engine_of, generate, tokens
from models import DAPE_KERPLE, random_model, write_model

SPARE = 99
WIDTH = 5
CPU = torch.device("cpu")


class Replays:
    """A capture that counts how often each size is replayed."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.captured = 0

    def compute(self, token_ids: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        self.seen.append((token_ids.clone(), positions.clone(), tables.clone()))
        return token_ids[:, None] * 10.0 + positions[:, None]

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        self.captured += 1
        return work


def graphs(replays: Replays, most: int = 6) -> DecodeGraphs:
    return DecodeGraphs(replays.compute, most, WIDTH, SPARE, CPU, replays)


def decoding(length: int, blocks: list[int]) -> Chunk:
    """The chunk of a sequence whose last token is to be followed."""
    sequence = Sequence("r", list(range(100, 100 + length)), SamplingParams(max_tokens=4), blocks=blocks)
    return Chunk(sequence, length - 1, 1)


def test_sizes_grow_in_steps_up_to_the_most() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(2) == [1, 2]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(16) == [1, 2, 4, 8, 16]
    assert batch_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]


def test_a_step_fills_the_next_larger_size() -> None:
    """What remains of it are rows that are not there, which write to the spare block."""
    replays = Replays()
    runner = graphs(replays)
    assert replays.captured == 4
    replays.seen.clear()
    found = runner.logits([decoding(3, [7]), decoding(9, [4, 2, 1]), decoding(1, [0])])
    assert found[:, 0].tolist() == [1022.0, 1088.0, 1000.0]
    ((token_ids, positions, tables),) = replays.seen
    assert token_ids.tolist()[:3] == [102, 108, 100]
    assert positions.tolist() == [2, 8, 0, -1]
    assert tables[0, 0] == 7
    assert tables[1, :3].tolist() == [4, 2, 1]
    assert tables[3].tolist() == [SPARE] * WIDTH


def test_rows_of_an_earlier_step_do_not_stay() -> None:
    replays = Replays()
    runner = graphs(replays)
    runner.logits([decoding(3, [7]), decoding(9, [4, 2, 1]), decoding(2, [3]), decoding(2, [5])])
    replays.seen.clear()
    assert runner.logits([decoding(2, [6])])[:, 0].tolist() == [1011.0]
    runner.logits([decoding(2, [6]), decoding(2, [1]), decoding(2, [2])])
    assert [positions.tolist() for _, positions, _ in replays.seen] == [[1], [1, 1, 1, -1]]
    assert replays.seen[1][2][3].tolist() == [SPARE] * WIDTH


def test_takes_steps_that_only_decode() -> None:
    runner = graphs(Replays(), most=2)
    one = decoding(3, [7])
    assert runner.takes([one, one])
    assert not runner.takes([])
    assert not runner.takes([one, one, one])
    assert not runner.takes([one, Chunk(one.sequence, 0, 2)])
    prompt = Sequence("r", [1, 2, 3], SamplingParams(max_tokens=4))
    assert not runner.takes([Chunk(prompt, 1, 1)])
    assert not runner.takes([Chunk(Sequence("s", [1, 2], score_from=1), 0, 1)])
    echoed = Sequence("e", [1, 2, 3], SamplingParams(max_tokens=4), score_from=1)
    assert runner.takes([Chunk(echoed, 2, 1)])


@pytest.fixture
def interpreted(triton: Backend[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend `triton` of the tests in the place of the product's."""
    monkeypatch.setitem(BACKENDS, "triton", triton)


@pytest.mark.usefixtures("interpreted")
async def test_engine_decodes_in_graphs(tmp_path: Path) -> None:
    """Streams that begin and end at different times get what they get alone, from another backend."""
    folder = write_model(tmp_path / "tiny", max_model_len=64)
    prompts = [(tokens(1, 5), 4), (tokens(2, 11), 2), (tokens(3, 2), 3)]
    options = {"max_num_seqs": 4, "attention_backend": "triton"}

    async def run(engine: object, *, together: bool) -> list[list[int]]:
        jobs = [
            generate(engine, prompt, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True))  # type: ignore[arg-type]
            for prompt, n in prompts
        ]
        return [drawn(o) for o in (await asyncio.gather(*jobs) if together else [await job for job in jobs])]

    async with engine_of(folder, attention_backend="chunked") as engine:
        expected = await run(engine, together=False)
    async with engine_of(folder, **options) as engine:
        engine._runner.warm_up()  # leaves nothing behind
        captured = engine._runner.graphs
        assert captured is not None
        replays: list[int] = []
        for size, graph in captured._graphs.items():
            graph.replay = lambda size=size, again=graph.replay: (replays.append(size), again())[1]
        assert await run(engine, together=True) == expected
        assert {1, 2, 4} >= set(replays) > set()
    async with engine_of(folder, **options, cuda_graphs=False) as engine:
        assert engine._runner.graphs is None


async def test_out_of_memory_ends_one_request_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that does not fit is computed request by request; the engine serves on."""
    folder = write_model(tmp_path / "tiny")
    released = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(1))
    async with engine_of(folder) as engine:
        begin = engine._runner.begin

        def too_little(chunks: list[Chunk]) -> object:
            if sum(chunk.count for chunk in chunks) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return begin(chunks)

        monkeypatch.setattr(engine._runner, "begin", too_little)
        results = await asyncio.gather(
            *(generate(engine, tokens(n, n)) for n in (9, 15, 30)), return_exceptions=True
        )
        assert [len(drawn(r)) if isinstance(r, list) else str(r) for r in results] == [
            8,
            8,
            "the model failed on this request: OutOfMemoryError",
        ]
        assert released
        assert len(drawn(await generate(engine, tokens(4, 12)))) == 8


SIZES = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {"intermediate_size": 256, "train_length": 32, "max_model_len": 64, **DAPE_KERPLE}
GIB = 1 << 30


def test_the_cache_gets_what_the_rest_leaves() -> None:
    config = random_model({**SIZES, **MORE}).config
    plan = plan_memory(60 * GIB, 80 * GIB, config, EngineOptions(gpu_memory_utilization=0.9), 2)
    assert plan.usable == 52 * GIB
    assert plan.cache == plan.usable - plan.workspace - plan.activations - plan.output
    assert plan.cache > 51 * GIB
    wider = EngineOptions(gpu_memory_utilization=0.9, max_num_batched_tokens=8192, max_num_seqs=512)
    assert plan_memory(60 * GIB, 80 * GIB, config, wider, 2).cache < plan.cache


def test_a_model_that_does_not_fit_is_refused_with_its_numbers() -> None:
    config = random_model({**SIZES, **MORE}).config
    with pytest.raises(SettingsError, match=r"of 8192 MiB 900 MiB are free .* leaves 80 MiB .* attention 64"):
        plan_memory(900 * MIB, 8192 * MIB, config, EngineOptions(max_num_batched_tokens=1 << 16), 2)


def test_the_cache_of_a_cpu_has_a_fixed_size() -> None:
    config = random_model({**SIZES, **MORE}).config
    asked = EngineOptions(kv_cache_memory="3MiB")
    assert cache_memory(config, EngineOptions(), CPU, torch.float32) == (GIB, "default")
    assert cache_memory(config, asked, CPU, torch.float32) == (3 * MIB, "asked for")
