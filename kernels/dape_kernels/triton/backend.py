"""The backend: checks, and the launches that a batch needs.

Letters: T rows of the batch, H heads, d head size.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from dape_kernels.backend import Backend
from dape_kernels.bias import Fire
from dape_kernels.encoding import Encoding
from dape_kernels.paged import RaggedBatch
from dape_kernels.triton.cache import TokenCache
from dape_kernels.triton.configs import Case, Phase, Tiling, choose, roomy
from dape_kernels.triton.encoding import FIRE_SLOPES, GROUP, PreparedEncoding
from dape_kernels.triton.plan import MOST_SPLITS, Launch, split_count, work

MAX_HEADS = 64
MAX_HEAD_DIM = 128
MAX_WIDTH = 64
KERNELS = (1, 3, 5)
LARGE_HEAD = 64
# What takes more shared memory than every device has for every dtype.
WIDE_LIMITS = f"more than {GROUP} heads or a head size above {LARGE_HEAD}"
BOTH_LIMITS = WIDE_LIMITS.replace(" or ", " and ")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Where Triton's interpreter stands in for a GPU.
INTERPRETED_CAPABILITY, INTERPRETED_PROCESSORS = (9, 0), 4


class TritonBackend(Backend[TokenCache]):
    """Every encoding but CoPE and BiPE, on CUDA devices, with a workspace for the parts of split keys only.

    Args:
        tiling: of all launches, instead of the committed ones; for tuning.
        interpreted: run on the CPU by Triton's interpreter, for tests: TRITON_INTERPRET=1 must have been set
            before Triton was imported.
    """

    name = "triton"
    replayable = True
    cache = TokenCache

    def __init__(self, *, tiling: Tiling | None = None, interpreted: bool = False):
        self._tiling = tiling
        self._device_type = "cpu" if interpreted else "cuda"

    def describe(self) -> str:
        """Return one line about what runs here."""
        return self.missing() or f"Triton {version('triton')}"

    def missing(self) -> str | None:
        """Return what this machine lacks, None where nothing is missing."""
        if find_spec("triton") is None:
            return "Triton is not installed; pip install 'dape-serve[cuda]'"
        if self._device_type == "cuda" and not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        return None

    def unsupported(
        self,
        encoding: Encoding,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,  # noqa: ARG002
    ) -> str | None:
        """Return why a layer cannot run here, None if it can."""
        dape, bias = encoding.dape, encoding.bias
        width, kernel = (0, 1) if dape is None else (len(dape.hidden_bias), dape.kernel)
        large, grouped = encoding.head_dim > LARGE_HEAD, encoding.heads > GROUP
        small = not roomy(capability(device))
        piecewise = isinstance(bias, Fire) and bias.activation in FIRE_SLOPES
        obstacles = (
            (device.type != self._device_type, f"{device.type} devices"),
            (dtype not in (*FLOATS, torch.int8), f"a cache of {dtype}"),
            (_is_wide(dtype) and (large or grouped), f"float32 with {WIDE_LIMITS}"),
            (kernel > 3 and large and grouped, f"DAPE kernel {kernel} with {BOTH_LIMITS}"),
            (small and (large or grouped), f"{WIDE_LIMITS} on this device"),
            (small and _is_wide(dtype), "float32 on this device"),
            (encoding.heads > MAX_HEADS, f"{encoding.heads} heads, above {MAX_HEADS}"),
            (encoding.head_dim > MAX_HEAD_DIM, f"head size {encoding.head_dim}, above {MAX_HEAD_DIM}"),
            (width > MAX_WIDTH, f"DAPE width {width}, above {MAX_WIDTH}"),
            (kernel not in KERNELS, f"DAPE kernel {kernel}, none of {', '.join(map(str, KERNELS))}"),
            (encoding.cope is not None, "CoPE"),
            (encoding.segmented, "biases of segments (BiPE)"),
            (bias is not None and not (bias.distance_only or piecewise), "this form of FIRE"),
        )
        return next((f"does not support {text}" for present, text in obstacles if present), self.missing())

    def prepare(self, encoding: Encoding, length: int, device: torch.device) -> Encoding:
        """Return an encoding with its weights and tables laid out for contexts up to `length`."""
        _prepared(encoding, device).reserve(length)
        return encoding

    def attend(
        self, query: Tensor, cache: TokenCache, batch: RaggedBatch, encoding: Encoding, workspace: int
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output [T, H, d] and the log-sum-exp [T, H]; see `paged_attention`.

        Products are of the queries' dtype, sums float32; the workspace bounds the parts of split keys.

        Raises:
            ValueError: queries that the kernels cannot read in place.
        """
        if query.dtype not in FLOATS or query.stride(-1) != 1:
            raise ValueError(
                f"query is {query.dtype} with strides {list(query.stride())}, expected float32, float16 or "
                "bfloat16 with the elements of a head adjacent"
            )
        if _is_wide(query.dtype) and (encoding.head_dim > LARGE_HEAD or encoding.heads > GROUP):
            raise ValueError(f"query is float32, which is not supported with {WIDE_LIMITS}")
        prepared = _prepared(encoding, query.device)
        prepared.reserve(max(batch.context_lens))
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:2], device=query.device)
        for launch in self._launches(query, batch, prepared, workspace, quantised=cache.scales is not None):
            run(query, cache, batch.block_tables, prepared, launch, output, lse)
        return output, lse

    def _launches(
        self,
        query: Tensor,
        batch: RaggedBatch,
        prepared: PreparedEncoding,
        workspace: int,
        *,
        quantised: bool,
    ) -> list[Launch]:
        """Return the launches of a batch, made once for all layers of a step."""
        phases: tuple[Phase, Phase] = ("prefill", "decode")
        tilings = tuple(
            self._tiling or tiling(phase, query.dtype, prepared, query.device, quantised=quantised)
            for phase in phases
        )
        heads, size = query.shape[1:]
        key = (self.name, query.dtype, tilings, workspace)

        def make() -> list[Launch]:
            launches = []
            for tiles, chosen in zip((True, False), tilings, strict=True):
                items = work(batch, chosen.rows, tiles=tiles)
                if not len(items):
                    continue
                splits = split_count(
                    len(items) * prepared.groups,
                    max(batch.context_lens),
                    chosen.keys,
                    len(items) * chosen.rows * heads * (size + 1) * 4,
                    workspace,
                    processors(query.device),
                )
                launches.append(Launch(chosen, items, splits))
            return launches

        launches: list[Launch] = batch.memo(key, make)
        return launches


def tiling(
    phase: Phase, dtype: torch.dtype, prepared: PreparedEncoding, device: torch.device, *, quantised: bool
) -> Tiling:
    """Return the committed tiling for one kind of launch."""
    settings = prepared.settings
    case = Case(
        phase,
        wide=_is_wide(dtype),
        taps=settings["TAPS"] if settings["WIDTH"] else 0,
        large=settings["SIZE"] > LARGE_HEAD,
        grouped=prepared.groups > 1,
        quantised=quantised,
    )
    return choose(capability(device), case)


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETED_CAPABILITY
    return torch.cuda.get_device_capability(device)


def run(
    query: Tensor,
    cache: TokenCache,
    block_tables: Tensor,
    prepared: PreparedEncoding,
    launch: Launch,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Compute the rows of one launch into output [T, H, d] and lse [T, H]."""
    from dape_kernels.triton.attend import attend_kernel, merge_kernel

    heads, size = query.shape[1:]
    nothing = prepared.bias_units  # where the kernel reads nothing
    tiling, splits = launch.tiling, launch.splits
    lines = len(launch.items) * tiling.rows
    parts = query.new_empty(splits, lines, heads, size, dtype=torch.float32) if splits > 1 else nothing
    part_lses = query.new_empty(splits, lines, heads, dtype=torch.float32) if splits > 1 else nothing
    network = prepared.network(query.dtype)
    weights = (
        (nothing,) * 4
        if network is None
        else (network.first, network.hidden_bias, network.second, network.out_bias)
    )
    scales = (nothing, nothing) if cache.scales is None else cache.scales.unbind(0)
    settings = prepared.settings
    attend_kernel[(len(launch.items), prepared.groups, splits)](
        query,
        query.stride(0),
        query.stride(1),
        cache.key,
        cache.value,
        *scales,
        block_tables,
        block_tables.stride(0),
        launch.items,
        *weights,
        prepared.bias_heads,
        prepared.bias_units,
        output,
        lse,
        parts,
        part_lses,
        splits,
        prepared.scale,
        **settings,
        QUANTISED=cache.scales is not None,
        BLOCK_SIZE=cache.block_size,
        PARTED=splits > 1,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if splits > 1:
        merge_kernel[(lines, heads)](
            launch.items,
            parts,
            part_lses,
            output,
            lse,
            splits,
            lines,
            HEADS=heads,
            SIZE=size,
            DIM=settings["DIM"],
            MOST_SPLITS=MOST_SPLITS,
            ROWS=tiling.rows,
            num_warps=1,
        )


def _prepared(encoding: Encoding, device: torch.device) -> PreparedEncoding:
    prepared: PreparedEncoding = encoding.memo(
        (TritonBackend.name, device), lambda: PreparedEncoding(encoding, device)
    )
    return prepared
