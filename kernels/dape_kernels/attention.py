"""The one entry to attention over a paged cache, and the registry of what can compute it.

A backend is one file and one line of `BACKENDS`. Letters: T rows of a ragged batch, H heads, d head size.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from dape_kernels.backend import Backend, LayerCache
from dape_kernels.chunked import ChunkedBackend
from dape_kernels.cpu import CpuBackend
from dape_kernels.encoding import Encoding
from dape_kernels.paged import RaggedBatch
from dape_kernels.reference_backend import ReferenceBackend
from dape_kernels.triton import TritonBackend
from dape_kernels.xformers_backend import XformersBackend

logger = logging.getLogger(__name__)

AUTO = "auto"


# The first that supports a layer is chosen, so the fastest come first.
BACKENDS: dict[str, Backend[Any]] = {
    backend.name: backend
    for backend in (CpuBackend(), XformersBackend(), TritonBackend(), ChunkedBackend(), ReferenceBackend())
}


def select_backend(
    name: str, encoding: Encoding, dtype: torch.dtype, device: torch.device, block_size: int
) -> Backend[Any]:
    """Return the backend `name`, or with "auto" the first of `BACKENDS` that supports the layer.

    Args:
        name: "auto" or a key of `BACKENDS`.
        encoding: the layer's score function.
        dtype: of the cache.
        device: of the cache and the queries.
        block_size: tokens in a block of the cache.

    Raises:
        ValueError: no such backend, or none of those allowed can run the layer; with the reasons.
    """
    if name != AUTO and name not in BACKENDS:
        known = ", ".join([AUTO, *BACKENDS])
        raise ValueError(f"unknown attention backend {name!r}, expected one of {known}")
    reasons: list[str] = []
    for backend in BACKENDS.values() if name == AUTO else (BACKENDS[name],):
        reason = backend.unsupported(encoding, dtype, device, block_size)
        if reason is None:
            why = "asked for" if name != AUTO else "; ".join([*reasons, "first that supports the model"])
            logger.info("attention backend %s (%s)", backend.name, why)
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"no attention backend can run the model: {'; '.join(reasons)}")


def shard_obstacle(backend: Backend[Any], encoding: Encoding) -> str | None:
    """Return why a layer cannot attend to a part of the keys of a sequence, None if it can.

    A score must depend on nothing but its own query and key.
    """
    kernel = 1 if encoding.dape is None else encoding.dape.kernel
    obstacles = (
        (not backend.shardable, f"backend {backend.name}"),
        (encoding.cope is not None, "CoPE: its positions are sums over all keys between"),
        (kernel > 1, f"DAPE kernel {kernel}: its scores depend on those of the keys beside"),
        (encoding.segmented, "biases of segments (BiPE): a row's segment is kept with its key"),
    )
    reasons = (
        f"keys spread over ranks are not supported by {text}" for present, text in obstacles if present
    )
    return next(reasons, None)


def paged_attention(
    query: Tensor,
    cache: LayerCache,
    batch: RaggedBatch,
    encoding: Encoding,
    *,
    backend: Backend[Any],
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the rows of a ragged batch to the cached keys of their sequences.

    Args:
        query: [T, H, d], rotated already where the encoding is rotary.
        cache: made by `backend.allocate`; holds the keys and values of all positions, new rows included.
        batch: which rows belong to which sequence.
        encoding: the layer's score function. `Backend.prepare` for the longest context saves preparing
            it in a call.
        backend: see `select_backend`.
        workspace: bytes of temporary memory, whatever the lengths of the contexts, where the backend's
            need is not small and fixed.

    Returns:
        The attention output [T, H, d] in the dtype of `query`, and the log-sum-exp [T, H] of every row's
        scores in float32 (float64 for float64 queries), by which partial results can be merged. Rows that
        see no key, as some do where the batch has a `shard`, have zeros and minus infinity.

    Raises:
        ValueError: the workspace is too small for one row and one key, or the batch has a `shard` that the
            backend or the encoding cannot be computed with.
    """
    obstacle = shard_obstacle(backend, encoding) if batch.shard is not None else None
    if obstacle is not None:
        raise ValueError(obstacle)
    return backend.attend(query, cache, batch, encoding, workspace)
