"""How far the float32 kernel is from the definition in float64."""

from __future__ import annotations

import torch

from dape_kernels.attention import BACKENDS
from dape_kernels.bench.workload import BLOCK_SIZE, CPU, WORKSPACE, Shape
from dape_kernels.paged import RaggedBatch

# (context, query rows): whole prompts, chunks and decode rows, off every multiple of a tile by one or more.
RAGGED = ((1, 1), (15, 15), (17, 17), (63, 63), (130, 130), (333, 333), (509, 509), (777, 37), (1021, 1))


def max_relative_error(shape: Shape, contexts: tuple[tuple[int, int], ...] = RAGGED) -> float:
    """Return the largest error of the backend `cpu` in float32 over all rows of a ragged batch.

    A row's error is the length of its difference from the definition in float64, over its own length: an
    error in one late row shows, although its values are small.

    Args:
        shape: of the layer.
        contexts: context and query rows of each sequence.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-context // BLOCK_SIZE) for context, _ in contexts]
    places = torch.randperm(sum(blocks), generator=generator, dtype=torch.int32).split(blocks)
    starts = torch.tensor([0, *(rows for _, rows in contexts)]).cumsum(0).tolist()
    batch = RaggedBatch(
        starts,
        [context for context, _ in contexts],
        torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True),
        BLOCK_SIZE,
    )
    size = (sum(blocks) * BLOCK_SIZE, shape.heads, shape.head_dim)
    query, key, value = (torch.randn(size, generator=generator) for _ in range(3))
    results = []
    for name, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        backend = BACKENDS[name]
        cache = backend.cache.allocate(sum(blocks), BLOCK_SIZE, shape.heads, shape.head_dim, dtype, CPU)
        cache.write(key.to(dtype), value.to(dtype), torch.arange(size[0]))
        encoding = backend.prepare(shape.encoding(dape=True, dtype=dtype), max(batch.context_lens), CPU)
        rows = query[: starts[-1]].to(dtype)
        results.append(backend.attend(rows, cache, batch, encoding, WORKSPACE)[0].double().flatten(1))
    found, exact = results
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())
