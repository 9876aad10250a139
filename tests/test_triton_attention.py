"""The Triton kernels against the definition in float64: every shape, every remainder, every kind of launch.

Where there is no GPU they run in Triton's interpreter, whose time goes with the number of tiles: hence tiny
sizes. It multiplies bfloat16 wrongly, so that dtype is left to machines with a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dape_engine.config import DapeConfig
from dape_kernels.attention import BACKENDS, paged_attention
from dape_kernels.backend import Backend
from dape_kernels.bias import Fire
from dape_kernels.encoding import Encoding
from dape_kernels.triton.configs import Case, choose, roomy
from dape_kernels.triton.encoding import PreparedEncoding
from dape_kernels.triton.plan import MOST_SPLITS, cut, split_count
from layers import (
    LAYERS,
    OFFICIAL,
    WITH_BIAS,
    Layer,
    Paged,
    device_of,
    random_batch,
    random_encoding,
    random_module,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

# Sandwich and the power kernel are tables like T5's.
ALIKE = ("cope", "sandwich", "kerple_power")
FORMS = [name for name in {**LAYERS, **OFFICIAL} if not name.startswith(ALIKE)]
# Whole sequences, chunks and decode rows whose ends lie around the borders of tiles and blocks.
ENDS = (1, 15, 16, 17, 33)
SPANS = [span for n in ENDS for span in ((n, n), (n, -(-n // 2)), (n, 1))]
MIXED = [(33, 9), (17, 17), (21, 1), (6, 3)]
SHAPES = [(1, 16, 1), (5, 24, 7), (12, 64, 32), (7, 80, 16), (20, 32, 4), (3, 128, 40), (33, 8, 64)]
ROUNDING = 2e-6
AMPLE = 1 << 24


def attend(
    backend: Backend[Any], paged: Paged, encoding: Encoding, workspace: int = AMPLE
) -> tuple[Tensor, Tensor]:
    output, lse = paged_attention(
        paged.query, paged.cache, paged.batch, encoding, backend=backend, workspace=workspace
    )
    return output.cpu(), lse.cpu()


def check(
    backend: Backend[Any],
    paged: Paged,
    layer: Layer,
    *,
    tolerance: float = ROUNDING,
    workspace: int = AMPLE,
) -> None:
    """Compare outputs and log-sum-exps of a layer with parameters as training starts from.

    Biases in the hundreds are rounded at their size.
    """
    heads, head_dim = paged.query.shape[1:]
    encoding = random_encoding(layer, heads, head_dim, torch.float32, std=None)
    output, lse = attend(backend, paged, encoding, workspace)
    exact = random_encoding(layer, heads, head_dim, torch.float64, std=None)
    farthest = torch.tensor(max(paged.batch.context_lens) - 1)
    largest_bias = float(exact.static_bias(farthest, torch.tensor(0)).abs().max())
    tolerance *= max(1.0, largest_bias / 128)
    expected, expected_lse = paged.expected(exact, torch.float64)
    assert relative_error(output, expected) < tolerance
    assert float((lse - expected_lse).abs().max()) < tolerance * max(1.0, float(expected_lse.abs().max()))


def check_shape(
    backend: Backend[Any], spans: list[tuple[int, int]], heads: int, head_dim: int, layer: Layer
) -> None:
    """In float32 where the backend has it, else in float16, whose products are rounded."""
    device, encoding = device_of(backend), Encoding(heads, head_dim)
    for dtype, tolerance in ((torch.float32, ROUNDING), (torch.float16, 3e-3)):
        if backend.unsupported(encoding, dtype, device, 4) is None:
            check(
                backend,
                random_batch(backend, spans, heads, head_dim, dtype=dtype),
                layer,
                tolerance=tolerance,
            )
            return
    raise AssertionError("neither float32 nor float16 is supported")


@pytest.mark.parametrize("form", FORMS)
def test_every_encoding(triton: Backend[Any], form: str) -> None:
    check(triton, random_batch(triton, MIXED, 3, 16), {**LAYERS, **OFFICIAL}[form])


@pytest.mark.parametrize("form", ["nope", "kerple-v1", "fire-v2-k3"])
def test_every_remainder(triton: Backend[Any], form: str) -> None:
    check(triton, random_batch(triton, SPANS, 3, 16), LAYERS[form])


@pytest.mark.parametrize(("heads", "head_dim", "width"), SHAPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_shape(triton: Backend[Any], heads: int, head_dim: int, width: int, kernel: int) -> None:
    layer = (WITH_BIAS["kerple"], DapeConfig(version=2, width=width, kernel=kernel))
    check_shape(triton, [(19, 7), (18, 1)], heads, head_dim, layer)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim", "width"), [*SHAPES, (4, 32, 8), (64, 128, 64), (16, 64, 20)])
@pytest.mark.parametrize("bias", ["alibi", "kerple_power", "sandwich", "fire"])
@pytest.mark.parametrize("kernel", [0, 1, 3, 5])
def test_every_shape_in_full(
    triton: Backend[Any], heads: int, head_dim: int, width: int, bias: str, kernel: int
) -> None:
    if kernel == 5 and heads > 16 and head_dim > 64:
        pytest.skip("takes more shared memory than there is")
    dape = None if kernel == 0 else DapeConfig(version=2, width=width, kernel=kernel)
    check_shape(triton, [(70, 40), (33, 33), (65, 1)], heads, head_dim, (WITH_BIAS[bias], dape))


@pytest.mark.parametrize("form", ["kerple", "kerple-v1", "kerple-v2-k5"])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_split_keys_agree(triton: Backend[Any], form: str, block_size: int) -> None:
    """Long contexts of few rows are split over their keys where the workspace has room for the parts."""
    paged = random_batch(triton, [(100, 1), (75, 5), (3, 1)], 4, 16, block_size=block_size)
    for workspace in (AMPLE, 0):
        check(triton, paged, LAYERS[form], workspace=workspace)


@pytest.mark.parametrize("form", ["nope", "kerple-v1", "fire-v1", "alibi-v2-k3"])
def test_float16_products(triton: Backend[Any], form: str) -> None:
    """Scores, weights and values are rounded to float16 before they are multiplied, sums are not."""
    paged = random_batch(triton, MIXED, 6, 32, dtype=torch.float16)
    check(triton, paged, LAYERS[form], tolerance=3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["nope", "kerple-v1", "fire-v1", "alibi-v2-k3"])
def test_bfloat16_products(triton: Backend[Any], form: str) -> None:
    paged = random_batch(triton, [(300, 200), (513, 1)], 12, 64, dtype=torch.bfloat16)
    check(triton, paged, LAYERS[form], tolerance=2e-2)


@pytest.mark.parametrize("form", ["kerple-v1", "kerple-v2-k3"])
@pytest.mark.parametrize("heads", [5, 18])
def test_int8_cache_loses_accuracy_only_when_written(triton: Backend[Any], form: str, heads: int) -> None:
    dtype, tolerance = (torch.float32, ROUNDING) if heads <= 16 else (torch.float16, 3e-3)
    paged = random_batch(triton, MIXED, heads, 24, dtype=dtype, cache_dtype=torch.int8)
    plain = []
    for sequence, (query, key, _) in enumerate(paged.plain):
        places = torch.arange(key.shape[2], device=paged.query.device)
        slots = paged.batch.key_slots(torch.tensor(sequence), places)
        cached = (x[None].cpu() for x in paged.cache.read(slots))
        plain.append((query, *cached))
    check(triton, Paged(paged.query, paged.cache, paged.batch, plain), LAYERS[form], tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_cache_gives_back_what_was_written(triton: Backend[Any], dtype: torch.dtype) -> None:
    """Exactly in the dtype of the cache, and to 254 steps per token and head in int8."""
    device = device_of(triton)
    cache = triton.cache.allocate(3, 4, 5, 24, dtype, device)
    packed = torch.randn(7, 5, 3, 24, device=device)
    packed[2, 1] = 0  # a scale of zero
    key, value = packed[:, :, 0], packed[:, :, 2]
    slots = torch.tensor([11, 0, 5, 4, 7, 2, 9], device=device)
    cache.write(key, value, slots)
    assert cache.num_blocks == 3
    for written, read in zip((key, value), cache.read(slots), strict=True):
        back = read.transpose(0, 1)
        if dtype == torch.int8:
            step = written.abs().amax(-1, keepdim=True) / 127
            assert bool(((back - written).abs() <= 0.5001 * step).all())
        else:
            assert torch.equal(back, written.to(dtype))
    with pytest.raises(ValueError, match=r"key is \[7, 5, 12\] .*, expected \[7, 5, 24\]"):
        cache.write(key[..., ::2], value, slots)


def test_queries_are_read_in_place(triton: Backend[Any]) -> None:
    """Queries may be a view of the fused projection; elements of a head must be adjacent."""
    paged = random_batch(triton, MIXED, 3, 16)
    packed = torch.randn(len(paged.query), 3, 3, 16, device=paged.query.device)
    packed[:, :, 1] = paged.query
    view = Paged(packed[:, :, 1], paged.cache, paged.batch, paged.plain)
    encoding = random_encoding(LAYERS["kerple-v1"], 3, 16, torch.float32)
    assert torch.equal(attend(triton, view, encoding)[0], attend(triton, paged, encoding)[0])
    with pytest.raises(ValueError, match=r"query is torch.float64 .*, expected float32, float16 or bfloat16"):
        attend(triton, Paged(paged.query.double(), paged.cache, paged.batch, []), encoding)


def test_tables_grow_with_the_context(triton: Backend[Any]) -> None:
    encoding = random_encoding(LAYERS["t5-v1"], 3, 16, torch.float32)
    for length in (3, 40):
        paged = random_batch(triton, [(length, 1)], 3, 16)
        expected, _ = paged.expected(encoding, torch.float32)
        assert relative_error(attend(triton, paged, encoding)[0], expected) < 1e-5


@pytest.mark.parametrize("form", ["kerple", "kerple_power-v1", "t5", "sandwich", "alibi-v1"])
def test_tables_are_made_where_the_parameters_lie(form: str) -> None:
    """Nothing of a layer on a device is mixed with what lies elsewhere; no kernel runs here."""
    elsewhere = torch.device("meta")
    module = random_module(LAYERS[form], 3, 16).to(elsewhere)
    prepared = PreparedEncoding(module.encoding(), elsewhere)
    prepared.reserve(10)
    assert prepared.bias_heads.device == elsewhere


@pytest.mark.parametrize(
    ("encoding", "dtype", "reason"),
    [
        (Encoding(3, 8), torch.float64, "a cache of torch.float64"),
        (Encoding(65, 8), torch.float16, "65 heads, above 64"),
        (Encoding(3, 136), torch.float16, "head size 136, above 128"),
        (Encoding(17, 8), torch.float32, "float32 with more than 16 heads or a head size above 64"),
        (Encoding(3, 72), torch.float32, "float32 with more than 16 heads or a head size above 64"),
        (random_encoding(LAYERS["cope"], 3, 8), torch.float32, "CoPE"),
        (
            random_encoding((WITH_BIAS["alibi"], DapeConfig(width=65)), 3, 8),
            torch.float32,
            "DAPE width 65, above 64",
        ),
        (
            replace(random_encoding(LAYERS["alibi"], 3, 8), segmented=True),
            torch.float32,
            "biases of segments",
        ),
        (
            random_encoding(LAYERS["nope-v2-k5"], 17, 72),
            torch.float16,
            "DAPE kernel 5 with more than 16 heads and a head size above 64",
        ),
        (random_encoding(LAYERS["kerple-v2-k3"], 3, 8), torch.float32, None),
    ],
)
def test_says_what_it_cannot_run(
    triton: Backend[Any], encoding: Encoding, dtype: torch.dtype, reason: str | None
) -> None:
    found = triton.unsupported(encoding, dtype, device_of(triton), 16)
    assert (found or "").startswith("" if reason is None else f"does not support {reason}")
    assert (found is None) == (reason is None)


def test_other_activations_of_fire_are_refused(triton: Backend[Any]) -> None:
    ones = torch.ones(2, 1)
    fire = Fire(torch.tensor(0.1), torch.tensor(9.0), ones, ones[:, 0], ones.t(), ones[0], functional.gelu)
    reason = triton.unsupported(Encoding(1, 8, fire), torch.float32, device_of(triton), 16)
    assert reason == "does not support this form of FIRE"


def test_never_chosen_for_a_cpu() -> None:
    """The interpreter is for tests: what the product registers runs on CUDA devices only."""
    reason = BACKENDS["triton"].unsupported(Encoding(3, 8), torch.float32, torch.device("cpu"), 16)
    assert reason == "does not support cpu devices"
    if not torch.cuda.is_available():
        device = torch.device("cuda")
        missing = BACKENDS["triton"].unsupported(Encoding(3, 8), torch.float32, device, 16)
        assert missing == BACKENDS["triton"].describe()
        assert "no CUDA device" in missing or "not installed" in missing


def test_small_devices_run_small_heads() -> None:
    """A device whose shared memory is small is not in the table of tilings."""
    assert roomy((9, 0))
    assert not roomy((8, 9))
    assert choose((8, 9), Case("prefill", large=True)) == choose((8, 6), Case("prefill"))
    for phase, quantised, taps in product(("prefill", "decode"), (False, True), (0, 1, 3, 5)):
        for wide, large, grouped in product((False, True), repeat=3):
            tiling = choose((9, 0), Case(phase, wide, taps, large, grouped, quantised))
            assert (tiling.rows == 1) == (phase == "decode")
            assert tiling.keys > 4 * (taps // 2)


def test_plan_covers_every_row_once(triton: Backend[Any]) -> None:
    batch = random_batch(triton, [(40, 37), (9, 2), (30, 5), (7, 1)], 1, 16).batch
    items = [*cut(batch, 16, tiles=True), *cut(batch, 1, tiles=False)]
    rows = sorted(row for first, count, *_ in items for row in range(first, first + count))
    assert rows == list(range(batch.query_starts[-1]))
    assert {(first, position) for first, _, sequence, position, _ in items if sequence == 2} == {(39, 25)}
    longest = [position + count for _, count, _, position, _ in cut(batch, 16, tiles=True)]
    assert longest == sorted(longest, reverse=True)


def test_splits_are_bounded() -> None:
    """By what keeps the processors busy, by the keys there are, and by the workspace."""
    settings = {"programs": 4, "longest": 4096, "keys": 16, "part_bytes": 100, "workspace": 10_000}
    assert split_count(**settings, processors=10) == 5
    assert split_count(**settings, processors=1) == 1
    assert split_count(**{**settings, "longest": 70}, processors=10) == 2
    assert split_count(**{**settings, "workspace": 250}, processors=10) == 2
    assert split_count(**{**settings, "workspace": 0}, processors=10) == 1
    assert split_count(**{**settings, "longest": 1 << 20}, processors=1000) == min(100, MOST_SPLITS)
