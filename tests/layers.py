"""Random attention layers and paged batches for the tests of the kernels."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dape_engine.config import DapeConfig, PositionConfig
from dape_engine.encoding import PositionalEncoding
from dape_kernels.backend import Backend, LayerCache
from dape_kernels.encoding import FORMS, Encoding
from dape_kernels.paged import RaggedBatch
from dape_kernels.reference import causal, reference_scores

WITH_BIAS = {
    "alibi": PositionConfig(kind="alibi"),
    "kerple": PositionConfig(kind="kerple"),
    "kerple_power": PositionConfig(kind="kerple_power"),
    "t5": PositionConfig(kind="t5"),
    "sandwich": PositionConfig(kind="sandwich", dimension=8),
    "fire": PositionConfig(kind="fire", mlp_width=5, init_length=9),
}
NOPE = PositionConfig(kind="nope")
COPE = PositionConfig(kind="cope", max_positions=6)
V1 = DapeConfig(width=7)
V2 = {f"v2-k{kernel}": DapeConfig(version=2, width=5, kernel=kernel) for kernel in (1, 3, 5)}
Layer = tuple[PositionConfig, DapeConfig | None]

# Every encoding that agrees with itself however a sequence is cut into chunks.
LAYERS: dict[str, Layer] = {
    "nope": (NOPE, None),
    "cope": (COPE, None),
    **{kind: (position, None) for kind, position in WITH_BIAS.items()},
    **{f"{kind}-v1": (position, V1) for kind, position in {"nope": NOPE, **WITH_BIAS}.items()},
    **{
        f"kerple-v1-{form}": (WITH_BIAS["kerple"], V1.model_copy(update={"form": form}))
        for form in FORMS
        if form != V1.form
    },
    **{
        f"{kind}-{name}": (position, dape)
        for kind, position in {"nope": NOPE, **WITH_BIAS}.items()
        for name, dape in V2.items()
    },
}
# And those that depend on where the sequence ends.
OFFICIAL: dict[str, Layer] = {
    f"{name}-official": (position, dape.model_copy(update={"right_edge": "official"}))
    for name, (position, dape) in LAYERS.items()
    if dape is not None and dape.kernel > 1
}


def random_module(
    layer: Layer, heads: int, head_dim: int, seed: int = 0, std: float | None = 0.5
) -> PositionalEncoding:
    """A layer's positional parameters, all random: some below the limits that they are clamped to.

    With `std` None they have the size of those that training starts from, and so have the scores.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = PositionalEncoding(*layer, heads, head_dim)
        if std is not None:
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=std)
    return module


def random_encoding(
    layer: Layer,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    std: float | None = 0.5,
) -> Encoding:
    """A layer's score function with random parameters."""
    return random_module(layer, heads, head_dim, seed, std).to(dtype).requires_grad_(False).encoding()


@dataclass(frozen=True, slots=True)
class Paged:
    """A batch with its queries and cache, and the same as plain tensors per sequence."""

    query: Tensor  # [T, H, d]
    cache: LayerCache
    batch: RaggedBatch
    plain: list[tuple[Tensor, Tensor, Tensor]]  # q [1, H, M, d] of the rows, k and v [1, H, N, d]

    def expected(self, encoding: Encoding, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output [T, H, d] and log-sum-exp [T, H] by the definition, in `dtype`."""
        outputs, logarithms = [], []
        for sequence in self.plain:
            query, key, value = (x.to(dtype) for x in sequence)
            scores = causal(reference_scores(query, key, encoding))
            outputs.append((scores.softmax(-1) @ value)[0].transpose(0, 1))
            logarithms.append(scores.logsumexp(-1)[0].t())
        return torch.cat(outputs), torch.cat(logarithms)


def page(
    backend: Backend[Any],
    sequences: Sequence[tuple[Tensor, Tensor, Tensor]],
    block_size: int,
    *,
    seed: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Paged:
    """Put sequences into a paged cache whose unused slots are NaN.

    Args:
        backend: whose cache.
        sequences: q [1, H, M, d] of the last M positions, k and v [1, H, N, d].
        block_size: tokens in a block.
        seed: shuffles the blocks; None leaves those of a sequence consecutive.
        cache_dtype: by default that of the sequences.
    """
    heads, head_dim, dtype = sequences[0][1].shape[1], sequences[0][1].shape[3], sequences[0][1].dtype
    lengths = [key.shape[2] for _, key, _ in sequences]
    counts = [-(-length // block_size) for length in lengths]
    blocks = sum(counts) + 3
    order = torch.arange(blocks)
    if seed is not None:
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    spare = int(order[-1])
    tables = torch.full((len(counts), max(counts) + 1), spare, dtype=torch.int32)
    for row, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        tables[row, :count] = order[end - count : end]
    device = device_of(backend)
    tables = tables.to(device)
    cache = backend.cache.allocate(blocks, block_size, heads, head_dim, cache_dtype or dtype, device)
    nothing = torch.full((blocks * block_size, heads, head_dim), float("nan"), dtype=dtype, device=device)
    cache.write(nothing, nothing, torch.arange(len(nothing), device=device))

    def flat(index: int) -> Tensor:
        return torch.cat([sequence[index][0].transpose(0, 1) for sequence in sequences]).to(device)

    whole = RaggedBatch([0, *accumulate(lengths)], lengths, tables, block_size)
    cache.write(flat(1), flat(2), whole.slots())
    rows = [query.shape[2] for query, _, _ in sequences]
    return Paged(
        flat(0), cache, RaggedBatch([0, *accumulate(rows)], lengths, tables, block_size), list(sequences)
    )


def device_of(backend: Backend[Any]) -> torch.device:
    """Where a backend of the tests keeps its tensors."""
    on_gpu = backend.name in ("triton", "xformers") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def smallest_block(backend: Backend[Any]) -> int:
    """The size of the smallest blocks that a backend and the tests' sequences can be cut into."""
    return 16 if backend.name == "cpu" else 4


def random_sequence(
    rows: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, rows, d], k and v [1, H, length, d] of normal numbers."""

    def draw(tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, head_dim, dtype=torch.float64, generator=generator).to(dtype)

    return draw(rows), draw(length), draw(length)


def random_batch(
    backend: Backend[Any],
    spans: Sequence[tuple[int, int]],
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    block_size: int | None = None,
    seed: int | None = 0,
    scale: float = 1.0,
) -> Paged:
    """A paged batch of sequences given as (context length, rows), queries times `scale`; else see `page`."""
    generator = torch.Generator().manual_seed(seed or 0)
    sequences = [random_sequence(rows, n, heads, head_dim, dtype, generator) for n, rows in spans]
    sequences = [(query * scale, key, value) for query, key, value in sequences]
    return page(backend, sequences, block_size or smallest_block(backend), seed=seed, cache_dtype=cache_dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; infinite where NaN appears."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    error = float((actual - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument in args:
            if isinstance(argument, Tensor):
                self.alive.setdefault(argument.untyped_storage()._cdata, 0)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.alive.values()))
        return result
