"""How much memory the KV cache may take: all that the rest of the engine leaves, decided once at start."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dape_engine.config import ModelConfig
from dape_engine.errors import NoMemoryError, SettingsError
from dape_engine.options import EngineOptions
from dape_engine.output_layer import WORKSPACE
from dape_kernels.host import available_memory

DEFAULT_CPU_CACHE = 1 << 30
# Vectors of a row that are alive at once in a layer: residual, norm, q k v and attention output, beside both
# sides of the activation.
ROW_VECTORS = 6
# Of the logits of a row: drawn from, sorted with their places, and their sums in float64.
LOGIT_COPIES = 8
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a device holds beside the weights, which are there already; in bytes."""

    usable: int
    """Of the memory that is free now, by `gpu_memory_utilization`."""
    workspace: int
    """Of attention: its scratch memory."""
    activations: int
    """Of the rows of a step."""
    output: int
    """Of the output layer: logits to draw from, and its scratch memory."""

    @property
    def cache(self) -> int:
        """What is left for the KV cache; negative if the rest does not fit."""
        return self.usable - self.workspace - self.activations - self.output

    def __str__(self) -> str:
        parts = (
            ("attention", self.workspace),
            ("activations", self.activations),
            ("output layer", self.output),
            ("KV cache", max(self.cache, 0)),
        )
        listed = ", ".join(f"{name} {size // MIB} MiB" for name, size in parts)
        return f"{self.usable // MIB} MiB beside the weights: {listed}"


def plan_memory(
    free: int, total: int, config: ModelConfig, options: EngineOptions, itemsize: int
) -> MemoryPlan:
    """Divide the memory of a device on which the weights lie already.

    Args:
        free: bytes that no one holds.
        total: bytes of the device.
        config: the model's.
        options: the engine's.
        itemsize: bytes of a number of the activations.

    Raises:
        SettingsError: nothing is left for the KV cache.
    """
    reserve = round(total * (1 - options.gpu_memory_utilization))
    plan = _plan(max(0, free - reserve), config, options, itemsize)
    if plan.cache <= 0:
        raise SettingsError(
            f"the model does not fit the GPU: of {total // MIB} MiB {free // MIB} MiB are free with the "
            f"weights loaded, and gpu_memory_utilization {options.gpu_memory_utilization:g} leaves {plan}. "
            "Lower max_num_batched_tokens or max_num_seqs, or raise gpu_memory_utilization"
        )
    return plan


def _plan(usable: int, config: ModelConfig, options: EngineOptions, itemsize: int) -> MemoryPlan:
    widest = 2 * config.intermediate_size + ROW_VECTORS * config.hidden_size
    return MemoryPlan(
        usable=usable,
        workspace=options.attention_workspace,
        activations=options.max_num_batched_tokens * widest * itemsize,
        output=options.max_num_seqs * config.vocab_size * 4 * LOGIT_COPIES + WORKSPACE,
    )


def check_fit(config: ModelConfig, options: EngineOptions, weights: int, cache: int, itemsize: int) -> None:
    """Refuse what a CPU's memory cannot hold, before the weights are read.

    Args:
        config: the model's.
        options: the engine's.
        weights: bytes of them.
        cache: bytes of the KV cache.
        itemsize: bytes of a number of the activations.

    Raises:
        SettingsError: it is not there.
    """
    # Ranks share the machine.
    available = available_memory() // options.context_parallel_size
    plan = _plan(available - weights, config, options, itemsize)
    if plan.cache < cache:
        rest = plan.workspace + plan.activations + plan.output
        raise SettingsError(
            f"the model does not fit: weights {weights // MIB} MiB, KV cache {cache // MIB} MiB and "
            f"activations {rest // MIB} MiB, and {available // MIB} MiB are available. "
            "Use dtype bfloat16 or quantization int8, or lower kv_cache_memory"
        )


def check_room(needed: int, what: str) -> None:
    """Refuse what takes more bytes than the machine has left.

    Raises:
        NoMemoryError: it does.
    """
    available = available_memory()
    if needed > available:
        raise NoMemoryError(
            f"{what} needs {needed // MIB} MiB of memory, and {available // MIB} MiB are available"
        )


def cache_memory(
    config: ModelConfig, options: EngineOptions, device: torch.device, dtype: torch.dtype
) -> tuple[int, str]:
    """Return the bytes of the KV cache and how they came about.

    Raises:
        SettingsError: see `plan_memory`.
    """
    if options.kv_cache_memory is not None:
        return options.kv_cache_memory, "asked for"
    if device.type != "cuda":
        return DEFAULT_CPU_CACHE, "default"
    plan = plan_memory(*torch.cuda.mem_get_info(device), config, options, dtype.itemsize)
    return plan.cache, str(plan)
