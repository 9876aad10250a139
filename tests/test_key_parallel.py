"""Key-parallel attention: spread over any number of ranks, a sequence is attended to as in one process."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from dape_engine.config import PositionConfig
from dape_kernels.attention import BACKENDS, paged_attention
from dape_kernels.backend import Backend
from dape_kernels.distributed import gathered_bytes, key_parallel_attention, merge, write_held
from dape_kernels.paged import KeyShard, RaggedBatch
from key_parallel_rank import CASES, GROUPS, STRIPES
from layers import LAYERS, page, relative_error
from shards import SPANS, page_shard, random_sequences, shard_encoding

POINTWISE = [
    name
    for name, (position, dape) in LAYERS.items()
    if position.kind != "cope" and (dape is None or dape.kernel == 1)
]
Results = dict[tuple[int, str, str], tuple[Tensor, Tensor]]


def attend(
    backend: Backend[Any],
    layer: str,
    shard: KeyShard | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What one process computes of the keys of a shard, or of all."""
    sequences, block_size = random_sequences(dtype), STRIPES[backend.name][0]
    paged = (
        page(backend, sequences, block_size, seed=0, cache_dtype=cache_dtype)
        if shard is None
        else page_shard(backend, sequences, block_size, shard, cache_dtype)
    )
    encoding = shard_encoding(LAYERS[layer], dtype)
    return paged_attention(
        paged.query, paged.cache, paged.batch, encoding, backend=backend, workspace=1 << 20
    )


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of four processes has computed."""
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).with_name("key_parallel_rank.py")
    processes = [
        subprocess.Popen([sys.executable, program, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(max(GROUPS))
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [torch.load(folder / f"{rank}.pt") for rank in range(max(GROUPS))]


@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize(("backend", "layer"), CASES)
def test_ranks_agree_with_one_process(of_ranks: list[Results], backend: str, layer: str, ranks: int) -> None:
    output, lse = of_ranks[0][ranks, backend, layer]
    for other in of_ranks[1:ranks]:
        assert all(map(torch.equal, other[ranks, backend, layer], (output, lse)))
    alone = attend(BACKENDS[backend], layer, None, torch.float32)
    assert relative_error(output, alone[0]) < 1e-6
    assert relative_error(lse, alone[1]) < 1e-6


@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize("layer", POINTWISE)
@pytest.mark.parametrize("name", ["chunked", "reference", "cpu"])
def test_parts_merge_to_the_whole(name: str, layer: str, ranks: int) -> None:
    backend, stripe = BACKENDS[name], STRIPES[name][1]
    dtype = torch.float32 if name == "cpu" else torch.float64
    parts = [attend(backend, layer, KeyShard(rank, ranks, stripe), dtype) for rank in range(ranks)]
    output, lse = merge(*map(torch.stack, zip(*parts, strict=True)))
    alone = attend(BACKENDS["reference"] if name != "cpu" else backend, layer, None, dtype)
    limit = 1e-6 if name == "cpu" else 1e-12
    assert relative_error(output, alone[0]) < limit
    assert relative_error(lse, alone[1]) < limit


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_narrow_caches_may_be_spread(cache_dtype: torch.dtype) -> None:
    backend, stripe = BACKENDS["cpu"], STRIPES["cpu"][1]
    parts = [
        attend(backend, "kerple-v1", KeyShard(rank, 2, stripe), torch.float32, cache_dtype) for rank in (0, 1)
    ]
    output, lse = merge(*map(torch.stack, zip(*parts, strict=True)))
    alone = attend(backend, "kerple-v1", None, torch.float32, cache_dtype)
    assert relative_error(output, alone[0]) < 1e-6
    assert relative_error(lse, alone[1]) < 1e-6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["chunked", "reference", "cpu"])
def test_rows_without_a_key_have_no_mass(name: str, threads: int) -> None:
    block_size, stripe = STRIPES[name]
    shard = KeyShard(1, 2, stripe)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output, lse = attend(BACKENDS[name], "kerple-v1", shard, torch.float32)
    finally:
        torch.set_num_threads(before)
    positions = torch.cat([torch.arange(length - rows, length) for length, rows in SPANS])
    blind = positions < stripe * block_size
    assert blind.sum() > 10
    assert lse[blind].isneginf().all()
    assert (output[blind] == 0).all()
    assert lse[~blind].isfinite().all()
    assert output.isfinite().all()


def test_a_rank_may_hold_no_key_at_all() -> None:
    for name, (_, stripe) in STRIPES.items():
        output, lse = attend(BACKENDS[name], "fire-v1", KeyShard(40, 41, 16 * stripe), torch.float32)
        assert (output == 0).all()
        assert lse.isneginf().all()


def test_spans_are_what_is_held() -> None:
    for ranks in (1, 2, 3, 5):
        for stripe in (1, 3):
            for length in (1, 4, 29, 60):
                shards = [KeyShard(rank, ranks, stripe) for rank in range(ranks)]
                spans = [[p for span in shard.spans(length, 4) for p in span] for shard in shards]
                for shard, span in zip(shards, spans, strict=True):
                    held = shard.holds(torch.arange(length) // 4)
                    assert span == held.nonzero()[:, 0].tolist()
                assert sorted(itertools.chain(*spans)) == list(range(length))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (LAYERS["cope"], "CoPE"),
        (LAYERS["kerple-v2-k3"], "DAPE kernel 3"),
        (LAYERS["nope-v2-k5"], "DAPE kernel 5"),
        ((PositionConfig(kind="bipe", segment_tokens=[0]), None), "BiPE"),
    ],
)
def test_scores_that_need_other_keys_are_refused(layer: Any, reason: str) -> None:
    paged = page_shard(BACKENDS["chunked"], random_sequences(torch.float32), 4, KeyShard(0, 2, 3))
    encoding = shard_encoding(layer, torch.float32)
    with pytest.raises(ValueError, match=f"spread over ranks are not supported by .*{reason}"):
        paged_attention(
            paged.query, paged.cache, paged.batch, encoding, backend=BACKENDS["chunked"], workspace=1 << 20
        )


@pytest.mark.parametrize("name", ["triton", "xformers"])
def test_other_backends_are_refused(name: str) -> None:
    paged = page_shard(BACKENDS["chunked"], random_sequences(torch.float32), 4, KeyShard(0, 2, 3))
    encoding = shard_encoding(LAYERS["nope"], torch.float32)
    with pytest.raises(ValueError, match=f"not supported by backend {name}"):
        paged_attention(
            paged.query, paged.cache, paged.batch, encoding, backend=BACKENDS[name], workspace=1 << 20
        )


def test_bad_shards_are_refused(tmp_path: Path) -> None:
    for rank, ranks in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank is {rank}, expected 0 to ranks - 1, of {ranks} ranks"):
            KeyShard(rank, ranks, 1)
    with pytest.raises(ValueError, match="stripe is 0 blocks"):
        KeyShard(0, 1, 0)
    backend, encoding = BACKENDS["cpu"], shard_encoding(LAYERS["nope"], torch.float32)
    paged = page_shard(backend, random_sequences(torch.float32), 16, KeyShard(0, 2, 3))
    with pytest.raises(ValueError, match="stripe is 48 keys, expected a multiple of 64"):
        paged_attention(paged.query, paged.cache, paged.batch, encoding, backend=backend, workspace=0)
    paged = page_shard(BACKENDS["chunked"], random_sequences(torch.float32), 4, KeyShard(0, 2, 3))
    whole = RaggedBatch(paged.batch.query_starts, paged.batch.context_lens, paged.batch.block_tables, 4)
    with pytest.raises(ValueError, match="batch has no shard"):
        write_held(paged.cache, paged.query, paged.query, whole)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="shard is of rank 0 of 2, expected that of rank 0 of 1"):
            key_parallel_attention(
                paged.query,
                paged.cache,
                paged.batch,
                encoding,
                backend=BACKENDS["chunked"],
                workspace=1 << 20,
            )
    finally:
        distributed.destroy_process_group()


def test_gathered_bytes() -> None:
    assert gathered_bytes(rows=1, heads=12, head_dim=64, ranks=8) == 7 * 12 * 65 * 4
