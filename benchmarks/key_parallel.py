"""Key-parallel attention of one layer on CPU ranks beside the same layer in one process.

    python benchmarks/key_parallel.py [--ranks 2] [--keys 16384,131072] [--rounds 5] [--json FILE]

DAPE-Kerple, 12 heads of 64, width 32; queries and cache in bfloat16; one sequence, a decode row and a chunk
of 256 rows. All ways take turns, one thread a rank unless said otherwise; every ratio is the median of the
ratios within the rounds. Bytes are counted, and read from the counters of the loopback device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed

from dape_kernels.attention import BACKENDS
from dape_kernels.backend import LayerCache
from dape_kernels.bench.machine import machine
from dape_kernels.bench.timing import ratio
from dape_kernels.bench.workload import BLOCK_SIZE, CPU, FILL_ROWS, WORKSPACE, Shape
from dape_kernels.distributed import gathered_bytes, key_parallel_attention, own_shard, write_held
from dape_kernels.paged import KeyShard, RaggedBatch

STRIPE = 16  # blocks, of 16 keys
CHUNK = 256
LEAST_SECONDS = 0.15  # of a sample, about
# Of one thread, about, which says how often a sample repeats its work.
SECONDS_PER_KEY, SECONDS_PER_PAIR = 100e-9, 16e-9
COUNTED_CALLS = 8
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
BACKEND = BACKENDS["cpu"]
SHAPE = Shape()


def fill(keys: int, shard: KeyShard) -> tuple[LayerCache, Tensor]:
    """Return a cache with what a shard holds of a sequence, and the block table [1, blocks]."""
    blocks = torch.arange(-(-keys // BLOCK_SIZE))
    held = shard.holds(blocks)
    table = torch.where(held, held.cumsum(0) - 1, 0).to(torch.int32)[None]
    cache = BACKEND.cache.allocate(
        max(1, int(held.sum())), BLOCK_SIZE, SHAPE.heads, SHAPE.head_dim, torch.bfloat16, CPU
    )
    for start in range(0, keys, FILL_ROWS):
        torch.manual_seed(start)
        end = min(start + FILL_ROWS, keys)
        _, key, value = SHAPE.tensors(end - start)
        write_held(cache, key, value, RaggedBatch([0, end - start], [end], table, BLOCK_SIZE, shard=shard))
    return cache, table


def sample(run: Callable[[], object], calls: int) -> float:
    """Return the milliseconds of a call, begun by all ranks at once."""
    distributed.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e3


def loopback_bytes(run: Callable[[], object]) -> float | None:
    """Return the bytes of a call of all ranks that passed the loopback device, with packet headers."""
    if not LOOPBACK.exists():
        return None
    distributed.barrier()
    before = int(LOOPBACK.read_text())
    for _ in range(COUNTED_CALLS):
        run()
    distributed.barrier()
    return (int(LOOPBACK.read_text()) - before) / COUNTED_CALLS


def measure(keys: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return the figures of a decode row and of a chunk; those of rank 0 count."""
    first = distributed.get_rank() == 0
    ranks = distributed.get_world_size()
    shard = own_shard(STRIPE)
    cache, table = fill(keys, shard)
    whole_cache, whole_table = fill(keys, KeyShard(0, 1, STRIPE)) if first else (cache, table)
    encoding = BACKEND.prepare(SHAPE.encoding(dape=True), keys, CPU)
    found = []
    for rows in (1, CHUNK):
        torch.manual_seed(rows)
        query = SHAPE.tensors(rows)[0].bfloat16()
        part = RaggedBatch([0, rows], [keys], table, BLOCK_SIZE, shard=shard)
        whole = RaggedBatch([0, rows], [keys], whole_table, BLOCK_SIZE)
        together = _together(query, cache, part, encoding)
        alone = _alone(query, whole_cache, whole, encoding)
        here = _alone(query, cache, part, encoding)
        calls = max(1, round(LEAST_SECONDS / (keys * (SECONDS_PER_KEY + rows * SECONDS_PER_PAIR))))
        times: dict[str, list[float]] = {"one": [], "one_all_threads": [], "ranks": [], "ranks_no_merge": []}
        for turn in range(rounds + 1):
            # While the whole is computed by rank 0, the others wait at the barrier of the next sample.
            took = {"one": sample(alone if first else _nothing, calls)}
            torch.set_num_threads(threads)
            took["one_all_threads"] = sample(alone if first else _nothing, calls)
            torch.set_num_threads(1)
            took["ranks"] = sample(together, calls)
            took["ranks_no_merge"] = sample(here, calls)
            if turn:
                for name, value in took.items():
                    times[name].append(value)
        passed = loopback_bytes(together)
        output, expected = together()[0].float(), alone()[0].float() if first else torch.ones(1)
        found.append(
            {
                "keys": keys,
                "rows": rows,
                "ms": {name: statistics.median(values) for name, values in times.items()},
                "speedup_over_one_thread": ratio(times["one"], times["ranks"]),
                "time_over_one_process_all_threads": ratio(times["ranks"], times["one_all_threads"]),
                "time_over_no_merge": ratio(times["ranks"], times["ranks_no_merge"]),
                "bytes_sent_by_each_rank": gathered_bytes(rows, SHAPE.heads, SHAPE.head_dim, ranks),
                "bytes_on_loopback_of_all_ranks": passed,
                "bytes_of_keys_and_values": keys
                * BACKEND.cache.block_bytes(BLOCK_SIZE, SHAPE.heads, SHAPE.head_dim, torch.bfloat16)
                // BLOCK_SIZE,
                "largest_difference_over_largest_output": float(
                    (output - expected).abs().max() / expected.abs().max()
                ),
            }
        )
    return found


def _together(query: Tensor, cache: LayerCache, batch: RaggedBatch, encoding: Any) -> Callable[[], Any]:
    return lambda: key_parallel_attention(query, cache, batch, encoding, backend=BACKEND, workspace=WORKSPACE)


def _alone(query: Tensor, cache: LayerCache, batch: RaggedBatch, encoding: Any) -> Callable[[], Any]:
    return lambda: BACKEND.attend(query, cache, batch, encoding, WORKSPACE)


def _nothing() -> None:
    pass


def run_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Measure as one of the ranks; rank 0 writes the results."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=args.ranks
    )
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    rows = [row for keys in args.keys for row in measure(keys, args.rounds, threads)]
    distributed.destroy_process_group()
    if rank == 0:
        torch.set_num_threads(threads)
        settings = {"ranks": args.ranks, "rounds": args.rounds, "stripe_keys": STRIPE * BLOCK_SIZE}
        text = json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=2) + "\n"
        args.json.write_text(text)


def main() -> None:
    """Parse the arguments and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--keys", type=lambda text: [int(n) for n in text.split(",")], default=[16384, 131072]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("/dev/stdout"))
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (args, folder), args.ranks)


if __name__ == "__main__":
    main()
