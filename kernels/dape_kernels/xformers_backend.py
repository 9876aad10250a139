"""xformers' attention for layers without a bias and without DAPE: NoPE and RoPE on CUDA devices.

Its kernels read a paged cache in place where a block is one of their pages. It is optional and imported when
first needed. Letters: T rows of a batch, S sequences, H heads, d head size.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dape_kernels.backend import Backend
from dape_kernels.encoding import Encoding
from dape_kernels.paged import RaggedBatch
from dape_kernels.triton.cache import TokenCache

# FlashAttention's pages are multiples of this, and its rows of this many bytes.
PAGE = 256
ALIGNMENT = 16


class XformersBackend(Backend[TokenCache]):
    """`memory_efficient_attention` over pages, causal from the last row backwards."""

    name = "xformers"
    cache = TokenCache

    def describe(self) -> str:
        """Return one line about what runs here, or why nothing does."""
        return self._missing() or f"xformers {version('xformers')}"

    def _missing(self) -> str | None:
        if find_spec("xformers") is None or find_spec("triton") is None:
            return "xformers is not installed; pip install 'dape-serve[cuda]'"
        return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"

    def unsupported(
        self, encoding: Encoding, dtype: torch.dtype, device: torch.device, block_size: int
    ) -> str | None:
        """Return why a layer cannot run here, None if it can."""
        row = encoding.head_dim * dtype.itemsize
        obstacles = (
            (device.type != "cuda", f"{device.type} devices"),
            (encoding.dape is not None, "DAPE"),
            (encoding.bias is not None or encoding.cope is not None, "a bias"),
            (dtype not in (torch.float16, torch.bfloat16), f"a cache of {dtype}"),
            (row % ALIGNMENT != 0, f"head size {encoding.head_dim}, no multiple of 8"),
            (block_size % PAGE != 0, f"block size {block_size}, no multiple of {PAGE}"),
        )
        return next((f"does not support {text}" for present, text in obstacles if present), self._missing())

    def prepare(self, encoding: Encoding, length: int, device: torch.device) -> Encoding:  # noqa: ARG002
        """Return the encoding: there is nothing to prepare."""
        return encoding

    def attend(
        self,
        query: Tensor,
        cache: TokenCache,
        batch: RaggedBatch,
        encoding: Encoding,
        workspace: int,  # noqa: ARG002 (pages are read in place)
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output [T, H, d] and the log-sum-exp [T, H]; see `paged_attention`."""
        fmha = _fmha()
        mask = batch.memo(self.name, lambda: _mask(fmha, batch))
        output, lse = fmha.memory_efficient_attention_forward_requires_grad(
            query[None].to(cache.key.dtype),
            cache.key[None],
            cache.value[None],
            attn_bias=mask,
            scale=encoding.scale,
        )
        return output[0].to(query.dtype), _rows_first(lse, batch)


def _fmha() -> Any:
    # It warns of compiled parts that are missing, which say nothing about those used here.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    from xformers.ops import fmha

    return fmha


def _mask(fmha: Any, batch: RaggedBatch) -> Any:
    """Return the mask of a batch: rows are the last positions of their sequence's pages."""
    return fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[end - start for start, end in pairwise(batch.query_starts)],
        kv_seqlen=batch.context_lens,
        block_tables=batch.block_tables,
        page_size=batch.block_size,
    )


def _rows_first(lse: Tensor, batch: RaggedBatch) -> Tensor:
    """Turn the log-sum-exp into [T, H]: kernels give it packed, [1, H, >= T], or padded, [S, H, >= rows]."""
    rows = batch.query_starts[-1]
    if len(lse) == 1 and lse.shape[-1] >= rows:
        return lse[0, :, :rows].t().float()
    spans = pairwise(batch.query_starts)
    return torch.cat(
        [part[:, : end - start].t() for part, (start, end) in zip(lse, spans, strict=True)]
    ).float()
