"""The backend: checks, and one call of the library for all rows of a batch.

Letters: T rows of the batch, S sequences, H heads, d head size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from dape_kernels.backend import Backend
from dape_kernels.bias import Fire
from dape_kernels.cpu.cache import PanelCache, check_rows, widen
from dape_kernels.cpu.decoder import CpuDecoder, decoder_obstacle
from dape_kernels.cpu.encoding import FIRE_SLOPES, PreparedEncoding
from dape_kernels.cpu.layout import Layout, batch_struct
from dape_kernels.cpu.library import PANEL, STORAGE, TILE, LibraryMissingError, instruction_set, load
from dape_kernels.decoder import DecoderModules
from dape_kernels.encoding import Encoding
from dape_kernels.paged import RaggedBatch

logger = logging.getLogger(__name__)
MAX_HEADS = 64
MAX_HEAD_DIM = 256
MAX_WIDTH = 128
KERNELS = (1, 3, 5)


class CpuBackend(Backend[PanelCache]):
    """Every encoding but CoPE and BiPE, on CPUs, in a few megabytes of scratch memory per thread."""

    name = "cpu"
    shardable = True
    cache = PanelCache

    def describe(self) -> str:
        """Return one line about what runs here."""
        try:
            return f"C++ with {instruction_set()}"
        except LibraryMissingError as error:
            return str(error)

    def unsupported(
        self, encoding: Encoding, dtype: torch.dtype, device: torch.device, block_size: int
    ) -> str | None:
        """Return why a layer cannot run here, None if it can."""
        try:
            load()
        except LibraryMissingError as error:
            return str(error)
        dape, bias = encoding.dape, encoding.bias
        width, kernel = (0, 1) if dape is None else (len(dape.hidden_bias), dape.kernel)
        piecewise = isinstance(bias, Fire) and bias.activation in FIRE_SLOPES
        official = kernel > 1 and dape is not None and dape.right_edge == "official"
        obstacles = (
            (device.type != "cpu", f"{device.type} devices"),
            (dtype not in STORAGE, f"a cache of {dtype}"),
            (block_size % PANEL != 0, f"block size {block_size}, no multiple of {PANEL}"),
            (encoding.heads > MAX_HEADS, f"{encoding.heads} heads, above {MAX_HEADS}"),
            (encoding.head_dim % 8 != 0, f"head size {encoding.head_dim}, no multiple of 8"),
            (encoding.head_dim > MAX_HEAD_DIM, f"head size {encoding.head_dim}, above {MAX_HEAD_DIM}"),
            (width > MAX_WIDTH, f"DAPE width {width}, above {MAX_WIDTH}"),
            (kernel not in KERNELS, f"DAPE kernel {kernel}, none of {', '.join(map(str, KERNELS))}"),
            (official, "the official right edge"),
            (encoding.cope is not None, "CoPE"),
            (encoding.segmented, "biases of segments (BiPE)"),
            (bias is not None and not (bias.distance_only or piecewise), "this form of FIRE"),
        )
        return next((f"does not support {text}" for present, text in obstacles if present), None)

    def prepare(self, encoding: Encoding, length: int, device: torch.device) -> Encoding:  # noqa: ARG002
        """Return an encoding with its weights and tables laid out for contexts up to `length`."""
        _prepared(encoding).struct(length)
        return encoding

    def decoder(
        self,
        modules: DecoderModules,
        caches: Sequence[PanelCache],
        encodings: Sequence[Encoding],
        length: int,
    ) -> CpuDecoder | None:
        """Return all layers in one call; see `Backend.decoder`."""
        obstacle = decoder_obstacle(modules)
        if obstacle is not None:
            logger.info("no fused decoder: it does not support %s", obstacle)
            return None
        return CpuDecoder(modules, caches, [_prepared(encoding) for encoding in encodings], length)

    def attend(
        self,
        query: Tensor,
        cache: PanelCache,
        batch: RaggedBatch,
        encoding: Encoding,
        workspace: int,  # noqa: ARG002 (the kernels' scratch memory is small and fixed)
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output [T, H, d] and the log-sum-exp [T, H]; see `paged_attention`.

        Products are bfloat16 where queries are and the processor can, else float32; sums are float32.

        Raises:
            ValueError: queries that the kernels cannot read in place, or a batch that does not fit the cache.
        """
        rows = widen(query)
        check_rows("query", rows, cache.struct)
        layout = Layout.of(batch, cache)
        if len(rows) != layout.rows:
            raise ValueError(f"query has {len(rows)} rows, the batch {layout.rows}")
        output = torch.empty(rows.shape, dtype=rows.dtype)
        lse = torch.empty(rows.shape[:2])
        call = batch_struct(layout, batch)
        call.cache = cache.struct
        call.encoding = _prepared(encoding).struct(layout.longest)
        call.query, call.query_row_stride, call.query_head_stride = rows.data_ptr(), *rows.stride()[:2]
        call.query_type = STORAGE[rows.dtype]
        call.output, call.lse = output.data_ptr(), lse.data_ptr()
        if batch.shard is not None:
            call.rank, call.ranks = batch.shard.rank, batch.shard.ranks
            call.stripe = batch.shard.stripe * batch.block_size
            if call.stripe % TILE:
                raise ValueError(f"stripe is {call.stripe} keys, expected a multiple of {TILE}")
        if load().dape_attend(byref(call)):
            raise MemoryError("no memory for the scratch of the attention threads")
        return output.to(query.dtype), lse


def _prepared(encoding: Encoding) -> PreparedEncoding:
    return encoding.memo(CpuBackend.name, lambda: PreparedEncoding(encoding))
