"""The C++ kernels against the definition in float64: every shape, every remainder, every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dape_engine.config import DapeConfig
from dape_kernels.attention import BACKENDS, paged_attention, select_backend
from dape_kernels.backend import Backend
from dape_kernels.bias import Fire
from dape_kernels.cpu import library
from dape_kernels.encoding import Encoding
from dape_kernels.paged import RaggedBatch
from layers import (
    LAYERS,
    OFFICIAL,
    WITH_BIAS,
    Layer,
    Paged,
    random_batch,
    random_encoding,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

DEVICE = torch.device("cpu")
FORMS = [name for name in LAYERS if name != "cope"]
# Whole sequences, chunks and decode rows whose ends lie around the borders of tiles, panels and blocks.
ENDS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200)
SPANS = [span for n in ENDS for span in ((n, n), (n, -(-n // 2)), (n, 1))]
SHAPES = [
    (1, 8, 1),
    (3, 24, 4),
    (6, 64, 32),
    (8, 32, 16),
    (12, 80, 8),
    (16, 128, 64),
    (64, 8, 128),
    (5, 256, 7),
]
ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def as_cached(paged: Paged) -> Paged:
    """The same batch with the keys and values that the cache gives back."""
    plain = []
    for sequence, (query, key, _) in enumerate(paged.plain):
        slots = paged.batch.key_slots(torch.tensor(sequence), torch.arange(key.shape[2]))
        cached_key, cached_value = paged.cache.read(slots)
        plain.append((query, cached_key[None], cached_value[None]))
    return Paged(paged.query, paged.cache, paged.batch, plain)


def attend(backend: Backend[Any], paged: Paged, encoding: Encoding) -> tuple[Tensor, Tensor]:
    return paged_attention(paged.query, paged.cache, paged.batch, encoding, backend=backend, workspace=0)


def check(
    backend: Backend[Any],
    paged: Paged,
    layer: Layer,
    heads: int,
    head_dim: int,
    *,
    seed: int = 0,
    tolerance: float = ROUNDING,
) -> None:
    """Compare outputs and log-sum-exps of a layer with parameters as training starts from.

    No row may be off by more than twice the tolerance for all. Where scores are so large that the definition
    in float32 is as far off, so may we be; and biases in the thousands are rounded at their size.
    """
    farthest = torch.tensor(max(paged.batch.context_lens) - 1)
    encoding = random_encoding(layer, heads, head_dim, torch.float32, seed, std=None)
    output, lse = attend(backend, paged, encoding)
    exact = random_encoding(layer, heads, head_dim, torch.float64, seed, std=None)
    largest_bias = float(exact.static_bias(farthest, torch.tensor(0)).abs().max())
    tolerance *= max(1.0, largest_bias / 256)
    expected, expected_lse = paged.expected(exact, torch.float64)
    assert float((lse - expected_lse).abs().max()) < tolerance * max(1.0, float(expected_lse.abs().max()))
    error, worst = errors(output, expected)
    if not (error < tolerance and worst < 2 * tolerance):
        own, own_worst = errors(paged.expected(encoding, torch.float32)[0], expected)
        assert error < max(tolerance, 2 * own)
        assert worst < 2 * max(tolerance, own_worst)


def errors(output: Tensor, expected: Tensor) -> tuple[float, float]:
    """Norm of the difference of all rows, and of the worst one, over the (mean) norm that is expected."""
    rows = (output.double() - expected).flatten(1).norm(dim=1)
    norm = expected.norm()
    return float(rows.norm() / norm), float(rows.max() / norm * len(rows) ** 0.5)


@pytest.mark.parametrize("form", FORMS)
def test_every_encoding_at_every_remainder(cpu: Backend[Any], form: str) -> None:
    check(cpu, random_batch(cpu, SPANS, 3, 24), LAYERS[form], 3, 24)


@pytest.mark.parametrize(("heads", "head_dim", "width"), SHAPES)
@pytest.mark.parametrize("bias", ["kerple", "fire"])
@pytest.mark.parametrize("kernel", [0, 1, 3, 5])
def test_every_shape(
    cpu: Backend[Any], heads: int, head_dim: int, width: int, bias: str, kernel: int
) -> None:
    dape = None if kernel == 0 else DapeConfig(version=2, width=width, kernel=kernel)
    paged = random_batch(cpu, [(129, 40), (65, 65), (17, 1)], heads, head_dim)
    check(cpu, paged, (WITH_BIAS[bias], dape), heads, head_dim)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("form", ["kerple", "kerple-v1", "fire-v1", "kerple-v2-k5"])
def test_threads_share_rows_and_keys(cpu: Backend[Any], form: str, threads: int) -> None:
    """A long context is split over its keys, where there are too few rows to split."""
    torch.set_num_threads(threads)
    for spans in ([(5000, 1)], [(3000, 3), (40, 1), (1, 1)], [(700, 300), (90, 1)]):
        check(cpu, random_batch(cpu, spans, 6, 16), LAYERS[form], 6, 16)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(FORMS),
    spans=st.lists(
        st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n) | st.just(1))),
        min_size=1,
        max_size=8,
    ),
    heads=st.integers(1, 13),
    head_dim=st.integers(1, 5).map(lambda eighth: 8 * eighth),
    block_size=st.sampled_from([16, 32, 48]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_random_ragged_batches(
    cpu: Backend[Any],
    form: str,
    spans: list[tuple[int, int]],
    heads: int,
    head_dim: int,
    block_size: int,
    threads: int,
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    paged = random_batch(cpu, spans, heads, head_dim, block_size=block_size, seed=seed)
    check(cpu, paged, LAYERS[form], heads, head_dim, seed=seed)


@pytest.mark.parametrize("form", ["nope", "kerple-v1", "fire", "kerple-v2-k3"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 24), (6, 64), (12, 40)])
def test_narrow_caches_lose_accuracy_only_when_written(
    cpu: Backend[Any], form: str, cache_dtype: torch.dtype, heads: int, head_dim: int
) -> None:
    paged = random_batch(cpu, SPANS[-15:], heads, head_dim, cache_dtype=cache_dtype)
    check(cpu, as_cached(paged), LAYERS[form], heads, head_dim)


@pytest.mark.parametrize("form", ["nope", "kerple", "kerple-v1", "fire-v1", "kerple-v2-k3"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bfloat16_queries(cpu: Backend[Any], form: str, cache_dtype: torch.dtype) -> None:
    """Products may be bfloat16, so every score, weight and value is off by up to 2^-8 of itself."""
    paged = random_batch(cpu, SPANS[-15:], 6, 32, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    output, lse = attend(cpu, paged, random_encoding(LAYERS[form], 6, 32, torch.float32, std=None))
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    check(cpu, as_cached(paged), LAYERS[form], 6, 32, tolerance=0.02)


@pytest.mark.parametrize("form", ["nope", "kerple"])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 24), (6, 64), (2, 256)])
def test_integer_products_are_finer_than_the_int8_cache(
    cpu: Backend[Any], form: str, heads: int, head_dim: int
) -> None:
    """Bfloat16 queries may be multiplied as 16-bit integers: the log-sum-exp shows their rounding alone."""
    paged = random_batch(cpu, SPANS, heads, head_dim, dtype=torch.bfloat16, cache_dtype=torch.int8)
    encoding = random_encoding(LAYERS[form], heads, head_dim, torch.float64)
    _, expected = as_cached(paged).expected(encoding, torch.float64)
    _, lse = attend(cpu, paged, random_encoding(LAYERS[form], heads, head_dim, torch.float32))
    assert (lse - expected).abs().max() < 1e-4


def test_float16_queries_are_widened(best_cpu: Backend[Any]) -> None:
    paged = random_batch(best_cpu, [(40, 7)], 3, 8, dtype=torch.float16, cache_dtype=torch.float32)
    encoding = random_encoding(LAYERS["kerple-v1"], 3, 8, torch.float32)
    output, _ = attend(best_cpu, paged, encoding)
    assert output.dtype == torch.float16
    expected, _ = paged.expected(encoding, torch.float32)
    assert torch.allclose(output.float(), expected, rtol=1e-3, atol=1e-5)


def test_the_cache_gives_back_what_was_written(best_cpu: Backend[Any]) -> None:
    """Exactly in float32, rounded once in bfloat16, and to 254 steps per token and head in int8."""
    key, value = torch.randn(2, 40, 3, 24)
    slots = torch.randperm(64)[:40]
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        cache = best_cpu.cache.allocate(4, 16, 3, 24, dtype, DEVICE)
        cache.write(key, value, slots)
        for written, read in zip((key, value), cache.read(slots), strict=True):
            written = written.transpose(0, 1)
            if dtype == torch.int8:
                step = written.abs().amax(-1, keepdim=True) / 127
                assert ((read - written).abs() <= step * 0.501).all()
            else:
                assert torch.equal(read, written.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_a_block_takes_the_bytes_it_says(best_cpu: Backend[Any], dtype: torch.dtype, head_dim: int) -> None:
    cache = best_cpu.cache.allocate(3, 32, 5, head_dim, dtype, DEVICE)
    tensors = [cache.key, cache.value] + ([] if cache.scales is None else [cache.scales])
    assert cache.num_blocks == 3
    assert sum(tensor.nbytes for tensor in tensors) == 3 * best_cpu.cache.block_bytes(32, 5, head_dim, dtype)


def test_queries_keys_and_values_may_be_views_of_one_tensor(best_cpu: Backend[Any]) -> None:
    """The model's fused projection gives [T, H, 3, d], which is read in place."""
    query, key, value = torch.randn(30, 3, 3, 16).unbind(-2)
    cache = best_cpu.cache.allocate(2, 16, 3, 16, torch.float32, DEVICE)
    batch = RaggedBatch([0, 30], [30], torch.tensor([[1, 0]], dtype=torch.int32), 16)
    cache.write(key, value, batch.slots())
    plain = tuple(x.transpose(0, 1)[None] for x in (query, key, value))
    paged = Paged(query, cache, batch, [plain])
    check(best_cpu, paged, LAYERS["kerple-v1"], 3, 16)
    with pytest.raises(ValueError, match=r"query is float32 \[30, 3, 16\] with strides .* adjacent"):
        attend(best_cpu, Paged(query.mT.contiguous().mT, cache, batch, [plain]), Encoding(3, 16))
    with pytest.raises(ValueError, match="key is float64"):
        cache.write(key.double(), value, batch.slots())
    with pytest.raises(ValueError, match=r"expected the same of both"):
        cache.write(key, value.bfloat16(), batch.slots())
    with pytest.raises(ValueError, match="slots are int32"):
        cache.write(key, value, batch.slots().int())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_tables": torch.tensor([[0, 2]])}, "a block outside of 0 to 1"),
        ({"block_tables": torch.tensor([[0]])}, "too narrow for a context of 30"),
        ({"block_size": 32}, "blocks of 32, the cache of 16"),
        ({"context_lens": [29]}, "do not fit contexts"),
        ({"query_starts": [0, 7]}, "query has 30 rows, the batch 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_batch_that_does_not_fit_is_refused(
    best_cpu: Backend[Any], change: dict[str, Any], message: str
) -> None:
    cache = best_cpu.cache.allocate(2, 16, 3, 16, torch.float32, DEVICE)
    settings = {"block_tables": torch.tensor([[0, 1]]), "block_size": 16}
    batch = RaggedBatch(**{"query_starts": [0, 30], "context_lens": [30], **settings, **change})
    with pytest.raises(ValueError, match=message):
        attend(best_cpu, Paged(torch.zeros(30, 3, 16), cache, batch, []), Encoding(3, 16))


@pytest.mark.parametrize("form", ["kerple-v1", "fire-v1", "alibi-v2-k3"])
def test_tables_grow_with_the_context(best_cpu: Backend[Any], form: str) -> None:
    """Prepared for nothing, for less than is asked, and for a length whose rows would share cache sets."""
    exact = random_encoding(LAYERS[form], 3, 8, std=None)
    encoding = random_encoding(LAYERS[form], 3, 8, torch.float32, std=None)
    for length in (9, 40, 41, 896, 897):
        paged = random_batch(best_cpu, [(length, min(length, 20))], 3, 8)
        expected, _ = paged.expected(exact, torch.float64)
        prepared = best_cpu.prepare(
            random_encoding(LAYERS[form], 3, 8, torch.float32, std=None), length, DEVICE
        )
        for usable in (encoding, prepared):
            assert errors(attend(best_cpu, paged, usable)[0], expected)[0] < 2 * ROUNDING


@pytest.mark.parametrize("activation", [functional.relu, functional.leaky_relu], ids=["relu", "leaky"])
@pytest.mark.parametrize("bend", [0.0, 0.3, -0.3, 5.0], ids=lambda bend: f"bend{bend}")
def test_fire_with_few_bends(best_cpu: Backend[Any], activation: Any, bend: float) -> None:
    """FIRE's network may have no bend among the normalised distances at all, and units of weight 0."""
    fire = Fire(
        c=torch.tensor(-0.5),
        threshold=torch.tensor(20.0),
        hidden_weight=torch.tensor([[1.0], [-1.0], [0.0], [0.0]]),
        hidden_bias=torch.tensor([-bend, bend, 0.7, -0.7]),
        out_weight=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        out_bias=torch.tensor([0.1, 0.2, 0.3]),
        activation=activation,
    )
    paged = random_batch(best_cpu, [(70, 70)], 3, 8)
    expected, _ = paged.expected(Encoding(3, 8, fire), torch.float32)
    assert relative_error(attend(best_cpu, paged, Encoding(3, 8, fire))[0], expected) < ROUNDING


def test_large_scores_stay_finite(cpu: Backend[Any]) -> None:
    """Weights that underflow, and a first tile whose scores are far below those of the last."""
    paged = random_batch(cpu, [(200, 200), (150, 1)], 3, 8)
    steep = Paged(paged.query * 1000, paged.cache, paged.batch, paged.plain)
    output, lse = attend(cpu, steep, Encoding(3, 8))
    plain = [(query * 1000, key, value) for query, key, value in paged.plain]
    expected, expected_lse = Paged(steep.query, paged.cache, paged.batch, plain).expected(
        Encoding(3, 8), torch.float64
    )
    assert relative_error(output, expected) < 1e-3
    assert relative_error(lse, expected_lse) < ROUNDING


@pytest.mark.parametrize(
    ("encoding", "dtype", "device", "block_size", "reason"),
    [
        (Encoding(3, 8), torch.float32, "cuda", 16, "cuda devices"),
        (Encoding(3, 8), torch.float64, "cpu", 16, "a cache of torch.float64"),
        (Encoding(3, 8), torch.float16, "cpu", 16, "a cache of torch.float16"),
        (Encoding(3, 8), torch.int8, "cpu", 24, "block size 24, no multiple of 16"),
        (Encoding(65, 8), torch.int8, "cpu", 16, "65 heads, above 64"),
        (Encoding(3, 20), torch.int8, "cpu", 16, "head size 20, no multiple of 8"),
        (Encoding(3, 264), torch.int8, "cpu", 16, "head size 264, above 256"),
        (random_encoding(LAYERS["cope"], 3, 8), torch.int8, "cpu", 16, "CoPE"),
        (random_encoding(OFFICIAL["alibi-v2-k3-official"], 3, 8), torch.int8, "cpu", 16, "official"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_named(
    best_cpu: Backend[Any],
    encoding: Encoding,
    dtype: torch.dtype,
    device: str,
    block_size: int,
    reason: str,
) -> None:
    found = best_cpu.unsupported(encoding, dtype, torch.device(device), block_size)
    assert found is not None
    assert reason in found


@pytest.fixture
def reopened() -> Iterator[None]:
    """Has the library opened anew in a test, and once more after it."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.usefixtures("reopened")
def test_without_a_library_chunked_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAPE_CPU_LIBRARY", str(tmp_path / "libdape_cpu.so"))
    assert "was not built; install g++" in BACKENDS["cpu"].describe()
    assert select_backend("auto", Encoding(3, 8), torch.float32, DEVICE, 16).name == "chunked"
    with pytest.raises(ValueError, match=r"cpu: libdape_cpu\.so was not built; install g"):
        select_backend("cpu", Encoding(3, 8), torch.float32, DEVICE, 16)
    (tmp_path / "libdape_cpu.so").write_text("no library")
    assert "cannot be opened" in BACKENDS["cpu"].describe()


@pytest.mark.usefixtures("best_cpu", "reopened")
def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPE_CPU_ISA", "portable")
    assert BACKENDS["cpu"].describe() == "C++ with portable"
    library.load.cache_clear()
    monkeypatch.setenv("DAPE_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="DAPE_CPU_ISA is 'avx1024', expected one of auto, avx512"):
        select_backend("auto", Encoding(3, 8), torch.float32, DEVICE, 16)


@pytest.mark.usefixtures("best_cpu", "reopened")
def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "STRUCTS", library.STRUCTS[::-1])
    assert "was built from other sources" in BACKENDS["cpu"].describe()
