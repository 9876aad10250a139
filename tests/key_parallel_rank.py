"""One rank of `test_key_parallel.py`: attends in groups of the first 2, 3 and 4 ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

from dape_kernels.attention import BACKENDS
from dape_kernels.distributed import key_parallel_attention, own_shard
from layers import LAYERS
from shards import page_shard, random_sequences, shard_encoding

# The C++ kernels want stripes of 64 keys.
STRIPES = {"cpu": (16, 4), "chunked": (4, 3), "reference": (4, 3)}
CASES = [
    ("cpu", "kerple-v1"),
    ("cpu", "fire-v1"),
    *(("chunked", name) for name in ("kerple-v1", "fire-v1", "nope", "t5-v2-k1", "kerple-v1-bias_only")),
    ("reference", "kerple-v1"),
]
GROUPS = (2, 3, 4)


def main(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=max(GROUPS)
    )
    results = {}
    for ranks in GROUPS:
        group = distributed.new_group(list(range(ranks)))
        if rank >= ranks:
            continue
        for backend_name, layer in CASES:
            backend = BACKENDS[backend_name]
            encoding = shard_encoding(LAYERS[layer], torch.float32)
            block_size, stripe = STRIPES[backend_name]
            paged = page_shard(backend, random_sequences(torch.float32), block_size, own_shard(stripe, group))
            results[ranks, backend_name, layer] = key_parallel_attention(
                paged.query,
                paged.cache,
                paged.batch,
                encoding,
                backend=backend,
                workspace=1 << 20,
                group=group,
            )
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
