"""POST /v1/attention_bias: equal to the definition over the whole text, whatever computes the model."""

from __future__ import annotations

import asyncio
import base64
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from dape_engine import inspection
from dape_engine.engine import AsyncEngine
from dape_engine.errors import DeadlineError, ModelFolderError, RequestError, StepError
from dape_engine.inspection import InspectionRequest, thinned
from dape_engine.loading import load_model
from dape_engine.options import EngineOptions
from dape_engine.request import GenerationRequest, SamplingParams, Scheduling
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_kernels.reference import reference_attention, reference_scores
from dape_server.app import create_app
from dape_server.settings import ServerSettings
from models import write_model

SMALL: dict[str, Any] = {"kv_cache_memory": 1 << 20, "block_size": 16, "max_num_batched_tokens": 64}
FORMS = {
    "dape-kerple": {"position": {"kind": "kerple"}, "dape": {"width": 8}},
    "dape-alibi": {"position": {"kind": "alibi"}, "dape": {"width": 8}},
    "dape-fire": {"position": {"kind": "fire"}, "dape": {"width": 8}},
    "v2-kerple": {"position": {"kind": "kerple"}, "dape": {"version": 2, "width": 8, "kernel": 3}},
    "dape-nope": {"position": {"kind": "nope"}, "dape": {"width": 8}},
    "static-kerple": {"position": {"kind": "kerple"}},
    "static-fire": {"position": {"kind": "fire"}},
    "rope": {"position": {"kind": "rope"}},
    "cope": {"position": {"kind": "cope"}},
}
IDS = tuple(int(token) for token in np.random.default_rng(0).integers(1, 300, 90))
PATH = "/v1/attention_bias"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, **settings) for name, settings in FORMS.items()}


@asynccontextmanager
async def engine_of(folder: Path, **options: Any):
    """A started engine that must end with all blocks free."""
    engine = AsyncEngine(folder, EngineOptions(**{**SMALL, **options}))
    engine.start()
    yield engine
    state = engine.state()
    await engine.shutdown(0)
    assert (state.free_blocks, state.running, state.waiting) == (state.total_blocks, 0, 0)


def asked(query: int = 70, **settings: Any) -> InspectionRequest:
    defaults = {"request_id": "b", "token_ids": IDS, "layers": (0, 1), "heads": (0, 1, 2, 3)}
    return InspectionRequest(**{**defaults, "query": query, **settings})


def dense(folder: Path, ids: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
    """A, B and what is added to A, each [H, N], of the last token in every layer, in float64."""
    model = load_model(folder, torch.float64, torch.device("cpu")).double()
    encodings = [position.encoding() for position in model.encodings]
    found = []

    def attend(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in qkv)
        encoding = encodings[layer]
        scores = (query @ key.transpose(-1, -2))[0, :, -1] * encoding.scale
        place = torch.arange(len(ids))
        bias = encoding.static_bias(place[-1:], place).double()
        found.append((scores, bias, reference_scores(query, key, encoding)[0, :, -1] - scores))
        return reference_attention(query, key, value, encoding)[0].transpose(0, 1)

    with torch.inference_mode():
        model(torch.tensor(ids), torch.arange(len(ids)), attend)
    return found


def check(found: inspection.Inspection, expected: list[tuple[torch.Tensor, ...]], tolerance: float) -> None:
    assert len(found.layers) == len(expected)
    for layer, (part, wanted) in enumerate(zip(found.layers, expected, strict=True)):
        assert part.layer == layer
        values = (part.scores, part.static_bias, part.adapted_bias)
        for ours, theirs in zip(values, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["auto", "chunked"])
async def test_equals_the_definition(folders: dict[str, Path], form: str, backend: str) -> None:
    # `auto` runs whole decoders in one call where it can, `chunked` layer by layer.
    async with engine_of(folders[form], attention_backend=backend) as engine:
        found = await engine.inspect(asked())
    assert found.keys == tuple(range(71))
    check(found, dense(folders[form], IDS[:71]), 2e-5)


@pytest.mark.parametrize("query", [0, 1, 15, 16, 17, 89])
async def test_every_place_in_a_block(folders: dict[str, Path], query: int) -> None:
    folder = folders["dape-kerple"]
    async with engine_of(folder) as engine:
        cold = await engine.inspect(asked(query))
        warm = await engine.inspect(asked(query))
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == query // 16 * 16
    check(cold, dense(folder, IDS[: query + 1]), 2e-5)
    check(warm, dense(folder, IDS[: query + 1]), 2e-5)


async def test_int8_cache_is_close(folders: dict[str, Path], best_cpu: Any) -> None:
    del best_cpu  # skips where there is no library
    folder = folders["dape-kerple"]
    async with engine_of(folder, kv_cache_dtype="int8") as engine:
        found = await engine.inspect(asked())
    expected = dense(folder, IDS[:71])
    check(found, expected, 0.2)
    # The keys are rounded, so it is not the exact answer either.
    assert np.abs(found.layers[1].scores - expected[1][0].numpy()).max() > 1e-5


async def test_chosen_layers_heads_and_keys_are_a_part_of_all(folders: dict[str, Path]) -> None:
    async with engine_of(folders["dape-kerple"]) as engine:
        whole = await engine.inspect(asked())
        part = await engine.inspect(asked(layers=(1,), heads=(3, 0), max_keys=8))
    assert part.keys == (0, 10, 20, 30, 40, 50, 60, 70)
    (layer,) = part.layers
    assert layer.layer == 1
    for name in ("scores", "static_bias", "adapted_bias"):
        ours, all_of_it = getattr(layer, name), getattr(whole.layers[1], name)
        np.testing.assert_allclose(ours, all_of_it[[3, 0]][:, list(part.keys)], atol=1e-6)


async def test_beside_running_requests(folders: dict[str, Path]) -> None:
    """Inspections change no one's text, and the weights they load are forgotten."""
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)

    async def text(engine: AsyncEngine) -> list[int]:
        outputs = engine.generate(GenerationRequest("g", IDS[:20], sampling))
        return [token async for output in outputs for token in output.token_ids]

    async with engine_of(folders["dape-kerple"]) as engine:
        alone = await text(engine)
        looks = [engine.inspect(asked(query, request_id=f"b{query}")) for query in range(60, 70)]
        together, *found = await asyncio.gather(text(engine), *looks)
        assert together == alone
        assert [len(look.keys) for look in found] == list(range(61, 71))
        assert len(engine._runner.model.layers) or engine._layers._loaded() is None


async def test_fault_ends_only_the_inspection(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    async with engine_of(folders["dape-kerple"]) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(inspection, "row_scores", fail)
            with pytest.raises(StepError, match="MemoryError"):
                await engine.inspect(asked())
        assert engine.state().failure is None
        assert len((await engine.inspect(asked())).layers) == 2


async def test_cancelled_and_late_requests_give_everything_back(folders: dict[str, Path]) -> None:
    async with engine_of(folders["dape-kerple"]) as engine:
        work = asyncio.ensure_future(engine.inspect(asked()))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        with pytest.raises(DeadlineError):
            await engine.inspect(asked(scheduling=Scheduling(deadline=0.0)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"query": 90}, "query: must be from 0 to 89 for an input of 90 tokens, got 90"),
        ({"query": -1}, "query: must be from 0"),
        ({"layers": (0, 2)}, "layers: must be from 0 to 1 for a model of 2 layers, got 2"),
        ({"heads": (4,)}, "heads: must be from 0 to 3 for a model of 4 heads, got 4"),
        ({"layers": ()}, "layers: at least one"),
        ({"token_ids": (1, 9999)}, "token id 9999"),
    ],
)
async def test_engine_refuses_what_does_not_exist(
    folders: dict[str, Path], settings: dict[str, Any], says: str
) -> None:
    async with engine_of(folders["dape-kerple"]) as engine:
        with pytest.raises(RequestError, match=says):
            await engine.inspect(asked(**settings))


async def test_replaced_model_folder_is_noticed(tmp_path: Path, best_cpu: Any) -> None:
    del best_cpu  # without a decoder nothing is read again
    folder = write_model(tmp_path / "model")
    async with engine_of(folder) as engine:
        write_model(folder, position={"kind": "alibi"})
        with pytest.raises(ModelFolderError, match="has changed"):
            await engine.inspect(asked())


def test_thinned_keys_are_even_and_keep_both_ends() -> None:
    assert thinned(5, None) == thinned(5, 9) == (0, 1, 2, 3, 4)
    assert thinned(16384, 1) == (16383,)
    assert thinned(11, 3) == (0, 5, 10)
    many = thinned(16384, 320)
    assert (len(set(many)), many[0], many[-1]) == (320, 0, 16383)
    assert set(np.diff(many)) <= {51, 52}


@asynccontextmanager
async def client_of(engine: AsyncEngine, **settings: Any):
    app = create_app(engine, ServerSettings(**settings))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield client


async def test_over_http(folders: dict[str, Path]) -> None:
    engine = AsyncEngine(folders["dape-kerple"], EngineOptions(**SMALL))
    async with client_of(engine) as client:
        body = {"input": list(IDS), "query": 70, "return_token_strs": True}
        answer = (await client.post(PATH, json=body)).json()
        narrow = {
            "input": list(IDS),
            "query": 70,
            "layers": [1],
            "heads": [2],
            "encoding_format": "base64",
            "max_keys": 5,
        }
        packed = (await client.post(PATH, json=narrow)).json()
        text = (await client.post(PATH, json={"input": "It was the best of times", "max_keys": 1})).json()
    expected = dense(folders["dape-kerple"], IDS[:71])
    assert answer["object"] == "attention_bias"
    assert (answer["query"], answer["num_keys"], answer["unit"]) == (70, 71, "nat")
    assert (answer["num_layers"], answer["num_heads"]) == (2, 4)
    assert (answer["position_kind"], answer["dape_version"]) == ("kerple", 1)
    assert answer["key_positions"] == list(range(71))
    assert len(answer["key_tokens"]) == 71
    assert answer["query_token"] == answer["key_tokens"][70]
    assert answer["usage"]["prompt_tokens"] == 90
    assert [part["layer"] for part in answer["layers"]] == [0, 1]
    for part, wanted in zip(answer["layers"], expected, strict=True):
        assert [head["head"] for head in part["heads"]] == [0, 1, 2, 3]
        for place, name in enumerate(("scores", "static_bias", "adapted_bias")):
            ours = [head[name] for head in part["heads"]]
            np.testing.assert_allclose(ours, wanted[place], atol=2e-5, rtol=2e-5)
    ((head,),) = [part["heads"] for part in packed["layers"]]
    values = np.frombuffer(base64.b64decode(head["adapted_bias"]), "<f4")
    keys = packed["key_positions"]
    assert keys == [0, 18, 35, 52, 70]
    np.testing.assert_allclose(values, expected[1][2][2, keys], atol=2e-5, rtol=2e-5)
    assert "key_tokens" not in packed
    assert text["key_positions"] == [text["query"]]
    assert len(text["layers"][0]["heads"][0]["scores"]) == 1


async def test_shipped_model_adapts_its_bias() -> None:
    """The point of it all: the adapted bias is not a function of the distance."""
    folder = resolve_model(DEFAULT_MODEL)
    engine = AsyncEngine(folder, EngineOptions(kv_cache_memory=128 << 20))
    async with client_of(engine) as client:
        body = {"input": "The cat sat on the mat. " * 20, "layers": [2]}
        answer = (await client.post(PATH, json=body)).json()
    head = answer["layers"][0]["heads"][0]
    static = np.array(head["static_bias"])
    assert (np.diff(static) >= 0).all()  # nearer keys get more
    assert (np.diff(head["adapted_bias"]) < 0).any()


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"query": 90}, "query", "query: must be from 0 to 89 for an input of 90 tokens, got 90"),
        ({"query": 1 << 30}, "query", "got 1073741824"),
        ({"query": -1}, "query", "query: "),
        ({"layers": [2]}, "layers", "layers: must be from 0 to 1"),
        ({"layers": []}, "layers", "layers: "),
        ({"layers": [0, 0]}, "layers", "layers: a number is given twice"),
        ({"heads": [0, 4]}, "heads", "heads: must be from 0 to 3"),
        ({"max_keys": 0}, "max_keys", "max_keys: "),
        ({"encoding_format": "hex"}, "encoding_format", "encoding_format: "),
        ({"input": [[1], [2]]}, "input", "input: must be one text or its token ids, got 2"),
        ({"input": ""}, "input", "input: is empty"),
        ({"input": [1] * 600}, "input", "input: 600 tokens are above the limit of 512"),
        ({"input": [1, 400]}, "input", "token id must be from 0 to 303, got 400"),
        ({"nonsense": 1}, "nonsense", "nonsense: unknown field"),
        ({"timeout": 1e9}, "timeout", "timeout: "),
    ],
)
async def test_bad_requests_are_refused_by_name(
    folders: dict[str, Path], change: dict[str, Any], param: str, says: str
) -> None:
    engine = AsyncEngine(folders["dape-kerple"], EngineOptions(**SMALL))
    async with client_of(engine) as client:
        answer = await client.post(PATH, json={"input": list(IDS), **change})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert says in answer.json()["error"]["message"]
        assert engine.state().free_blocks == engine.num_blocks


async def test_too_many_values_are_refused_with_the_numbers() -> None:
    engine = AsyncEngine(resolve_model(DEFAULT_MODEL), EngineOptions(kv_cache_memory=128 << 20))
    async with client_of(engine) as client:
        body = {"input": [5] * 8000}
        answer = await client.post(PATH, json=body)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert "3 values x 6 layers x 8 heads x 8000 keys = 1152000" in message
        assert "limit of 1048576" in message
        assert engine.state().steps == 0
