"""Attention over a paged cache: every way to cut the same sequences into tiles gives the same answer."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dape_kernels.attention import BACKENDS, paged_attention, select_backend
from dape_kernels.backend import Backend
from dape_kernels.chunked.plan import CPU_WORKSPACE
from dape_kernels.encoding import Encoding
from dape_kernels.paged import RaggedBatch
from dape_kernels.reference import reference_scores
from dape_kernels.reference_backend import row_scores
from layers import (
    LAYERS,
    OFFICIAL,
    Paged,
    PeakMemory,
    device_of,
    page,
    random_batch,
    random_encoding,
    random_sequence,
    relative_error,
    smallest_block,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

CHUNKED = BACKENDS["chunked"]
AMPLE = 1 << 20
INTERPRETED = ("kerple-v1", "fire-v2-k3")
NARROW = ("cpu", "triton")  # backends without float64


def attend(
    paged: Paged, encoding: Encoding, workspace: int = AMPLE, backend: Backend[Any] = CHUNKED
) -> Tensor:
    output, _ = paged_attention(
        paged.query, paged.cache, paged.batch, encoding, backend=backend, workspace=workspace
    )
    return output


def smallest_workspace(paged: Paged, encoding: Encoding) -> int:
    """The number of bytes that the refusal of a too small workspace asks for."""
    with pytest.raises(ValueError, match="workspace is 1 bytes, at least") as refusal:
        attend(paged, encoding, 1)
    return int(str(refusal.value).split()[-3])


SPANS = st.lists(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n) | st.just(1))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    layer=st.sampled_from([*LAYERS, *OFFICIAL]),
    spans=SPANS,
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 4).map(lambda half: 2 * half - 1),
    block_size=st.sampled_from([1, 3, 16]),
    seed=st.none() | st.integers(0, 99),
    scale=st.sampled_from([1.0, 40.0]),
    slack=st.sampled_from([0, 1000, 10_000, AMPLE]),
    precision=st.sampled_from([(torch.float64, 1e-9), (torch.float32, 1e-5)]),
)
def test_chunked_equals_definition(
    layer: str,
    spans: list[tuple[int, int]],
    heads: int,
    head_dim: int,
    block_size: int,
    seed: int | None,
    scale: float,
    slack: int,
    precision: tuple[torch.dtype, float],
) -> None:
    """Any mix of chunks and decode rows, any blocks, tiles from one pair to everything."""
    dtype, tolerance = precision
    encoding = random_encoding({**LAYERS, **OFFICIAL}[layer], heads, head_dim, dtype, seed or 0)
    paged = random_batch(
        CHUNKED, spans, heads, head_dim, dtype=dtype, block_size=block_size, seed=seed, scale=scale
    )
    workspace = smallest_workspace(paged, encoding) + slack
    output, lse = paged_attention(
        paged.query, paged.cache, paged.batch, encoding, backend=CHUNKED, workspace=workspace
    )
    exact = random_encoding({**LAYERS, **OFFICIAL}[layer], heads, head_dim, torch.float64, seed or 0)
    expected, expected_lse = paged.expected(exact, torch.float64)
    assert relative_error(output, expected) < tolerance
    assert float((lse - expected_lse).abs().max()) < tolerance * max(1.0, float(expected_lse.abs().max()))


@pytest.mark.parametrize("layer", [*LAYERS, *OFFICIAL])
@pytest.mark.parametrize("slack", [0, 20_000])
def test_every_encoding_in_many_tiles(layer: str, slack: int) -> None:
    """A tile of one pair, and tiles of some rows and keys, for chunks and decode rows together."""
    encoding = random_encoding({**LAYERS, **OFFICIAL}[layer], 3, 5)
    paged = random_batch(CHUNKED, [(37, 20), (50, 1), (5, 5), (41, 1), (3, 1)], 3, 5, dtype=torch.float64)
    output = attend(paged, encoding, smallest_workspace(paged, encoding) + slack)
    assert relative_error(output, paged.expected(encoding, torch.float64)[0]) < 1e-9


@pytest.mark.parametrize("layer", LAYERS)
def test_chunks_agree_with_one_shot(backend: Backend[Any], layer: str) -> None:
    """Row by row, in chunks of odd sizes, and all at once."""
    if backend.name == "triton" and device_of(backend).type == "cpu" and layer not in INTERPRETED:
        pytest.skip("Triton's interpreter takes seconds for each")
    length, block_size = 23, smallest_block(backend)
    encoding = random_encoding(LAYERS[layer], 3, 8, torch.float32)
    sequence = random_sequence(length, length, 3, 8, torch.float32, torch.Generator().manual_seed(1))
    reason = backend.unsupported(encoding, torch.float32, device_of(backend), block_size)
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")
    encoding = backend.prepare(encoding, length, device_of(backend))

    def run(sizes: list[int]) -> Tensor:
        parts, end = [], 0
        for size in sizes:
            start, end = end, end + size
            query, key, value = (x[:, :, :end] for x in sequence)
            paged = page(backend, [(query[:, :, start:], key, value)], block_size, seed=end)
            parts.append(attend(paged, encoding, backend=backend))
        return torch.cat(parts)

    one_shot = run([length])
    assert relative_error(run([1] * length), one_shot) < 1e-5
    assert relative_error(run([5, 1, 7, 10]), one_shot) < 1e-5


def test_batch_mates_do_not_matter(backend: Backend[Any]) -> None:
    """A sequence gets the same answer alone and among others."""
    dtype, tolerance = (torch.float32, 1e-6) if backend.name in NARROW else (torch.float64, 1e-12)
    encoding, block_size = random_encoding(LAYERS["kerple-v1"], 3, 8, dtype), smallest_block(backend)
    spans = [(37, 5), (9, 9), (150, 1), (2, 1)]
    together = random_batch(backend, spans, 3, 8, dtype=dtype, block_size=block_size)
    output = attend(together, encoding, backend=backend)
    for index, sequence in enumerate(together.plain):
        alone = page(backend, [sequence], block_size)
        rows = slice(*together.batch.query_starts[index : index + 2])
        assert relative_error(attend(alone, encoding, backend=backend), output[rows]) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["chunked", "reference"])
def test_half_precision_accumulates_in_float32(name: str, dtype: torch.dtype) -> None:
    """Half-precision tensors lose accuracy once, when the output is rounded."""
    backend = BACKENDS[name]
    encoding = random_encoding(LAYERS["kerple-v1"], 3, 5, torch.float32)
    paged = random_batch(backend, [(300, 3), (11, 11)], 3, 5, dtype=dtype)
    output, lse = paged_attention(
        paged.query, paged.cache, paged.batch, encoding, backend=backend, workspace=AMPLE
    )
    expected, expected_lse = paged.expected(encoding, torch.float32)
    assert output.dtype == dtype
    assert torch.allclose(output.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert lse.dtype == torch.float32
    assert relative_error(lse, expected_lse) < 1e-5


def test_cache_may_be_narrower_than_the_queries() -> None:
    encoding = random_encoding(LAYERS["alibi-v1"], 3, 5, torch.float32)
    paged = random_batch(CHUNKED, [(40, 7)], 3, 5, dtype=torch.bfloat16)
    wide = Paged(paged.query.float(), paged.cache, paged.batch, paged.plain)
    output = attend(wide, encoding)
    assert output.dtype == torch.float32
    assert relative_error(output, paged.expected(encoding, torch.float32)[0]) < 1e-5


def test_tables_may_be_missing_short_or_long() -> None:
    encoding = random_encoding(LAYERS["kerple-v1"], 3, 5)
    paged = random_batch(CHUNKED, [(40, 7), (3, 1)], 3, 5, dtype=torch.float64)
    expected, _ = paged.expected(encoding, torch.float64)
    for tabulated in (encoding, encoding.with_tables(8), encoding.with_tables(999)):
        assert relative_error(attend(paged, tabulated), expected) < 1e-9


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        ("nope", torch.float32),
        ("kerple-v1", torch.float32),
        ("kerple-v1", torch.bfloat16),
        ("fire-v1", torch.float32),
        ("kerple-v2-k5", torch.float32),
        ("fire-v2-k3", torch.float32),
        ("cope", torch.float32),
    ],
)
@pytest.mark.parametrize("rows", [1, 40])
def test_workspace_bounds_memory(layer: str, rows: int, dtype: torch.dtype) -> None:
    """Beside the output, no more than the workspace is taken, however long the context."""
    workspace = 1 << 17
    encoding = random_encoding(LAYERS[layer], 4, 16, torch.float32).with_tables(900)
    for length in (150, 900):
        paged = random_batch(CHUNKED, [(length, rows), (length - 20, 1)], 4, 16, dtype=dtype, block_size=16)
        attend(paged, encoding, workspace)  # makes the plan, which all layers of a step share
        with PeakMemory() as memory:
            output, lse = paged_attention(
                paged.query, paged.cache, paged.batch, encoding, backend=CHUNKED, workspace=workspace
            )
        results = output.untyped_storage().nbytes() + lse.untyped_storage().nbytes()
        assert results < memory.peak <= results + workspace


def test_workspace_too_small_is_refused() -> None:
    encoding = random_encoding(LAYERS["fire-v2-k5"], 3, 5)
    paged = random_batch(CHUNKED, [(40, 7)], 3, 5, dtype=torch.float64)
    enough = smallest_workspace(paged, encoding)
    with pytest.raises(ValueError, match=f"is {enough - 1} bytes, at least {enough} are needed"):
        attend(paged, encoding, enough - 1)
    assert attend(paged, encoding, enough).isfinite().all()


def test_slots_follow_the_block_tables() -> None:
    batch = RaggedBatch([0, 3, 4], [5, 9], torch.tensor([[7, 2, 0], [4, 0, 1]], dtype=torch.int32), 4)
    assert batch.slots().tolist() == [7 * 4 + 2, 7 * 4 + 3, 2 * 4, 1 * 4]


@pytest.mark.parametrize("layer", ["nope", "cope", "kerple", "fire-v1", "alibi-v2-k3", *OFFICIAL])
def test_row_scores_are_rows_of_the_definition(layer: str) -> None:
    """A, B and the adapted bias of single rows add up to the rows of the whole score matrix."""
    length = 11
    encoding = random_encoding({**LAYERS, **OFFICIAL}[layer], 3, 5)
    paged = random_batch(CHUNKED, [(4, 2), (length, 6)], 3, 5, dtype=torch.float64)
    query, key, _ = paged.plain[1]
    whole = reference_scores(query, key, encoding)[0]
    plain = (query @ key.transpose(-1, -2))[0] * encoding.scale
    bias = encoding.static_bias(torch.arange(length)[-6:, None], torch.arange(length))
    for row in range(6):
        seen = slice(length - 6 + row + 1)
        found = row_scores(paged.query, paged.cache, paged.batch, encoding, 2 + row)
        assert torch.allclose(found.scores, plain[:, row, seen])
        assert torch.allclose(found.static_bias, bias[:, row, seen].double())
        assert torch.allclose(found.scores + found.adapted_bias, whole[:, row, seen])


def test_selection_says_why(caplog: pytest.LogCaptureFixture) -> None:
    layer = (random_encoding(LAYERS["cope"], 3, 5), torch.float32, torch.device("cpu"), 4)
    with caplog.at_level("INFO"):
        assert select_backend("auto", *layer) is CHUNKED
        assert select_backend("reference", *layer) is BACKENDS["reference"]
    before = takewhile(lambda backend: backend is not CHUNKED, BACKENDS.values())
    reasons = [f"{backend.name}: {backend.unsupported(*layer)}; " for backend in before]
    assert [record.getMessage() for record in caplog.records] == [
        f"attention backend chunked ({''.join(reasons)}first that supports the model)",
        "attention backend reference (asked for)",
    ]
    with pytest.raises(ValueError, match="backend 'chuncked', expected one of auto, cpu, xformers, triton"):
        select_backend("chuncked", *layer)
    with pytest.raises(ValueError, match=r"cpu: .*; chunked: does not support .*int8; ref"):
        select_backend("auto", layer[0], torch.int8, *layer[2:])


@pytest.mark.parametrize("layer", ["kerple-v1", "fire-v1", "cope", "kerple-v2-k3"])
def test_threads_share_the_groups_of_a_batch(layer: str) -> None:
    """However many threads compute them, the results are the same, and PyTorch's own number is kept."""
    encoding = random_encoding(LAYERS[layer], 3, 5)
    paged = random_batch(CHUNKED, [(300, 200), (90, 1), (700, 1), (41, 41)], 3, 5, dtype=torch.float64)
    before = torch.get_num_threads()
    expected, _ = paged.expected(encoding, torch.float64)
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            output = attend(paged, encoding, 3 * CPU_WORKSPACE)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        alone = attend(paged, encoding, CPU_WORKSPACE)
    finally:
        torch.set_num_threads(before)
    assert relative_error(output, expected) < 1e-9
    assert torch.equal(output, alone)
