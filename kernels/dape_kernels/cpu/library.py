"""The compiled library and its C interface: mirrors kernels/csrc/abi.h field by field.

`load` opens the library beside this file, or the one that DAPE_CPU_LIBRARY names, when it is first needed.
DAPE_CPU_ISA chooses among the instruction sets that it was compiled for.
"""

from __future__ import annotations

import os
from ctypes import CDLL, POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p, sizeof
from functools import cache
from pathlib import Path

import torch

BUILDS = ("avx512+amx", "avx512+bf16", "avx512+fp32", "avx2", "portable")
"""Instruction sets, and for AVX-512 what multiplies bfloat16: matrix units, vectors, or nothing."""
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
PANEL = 16  # keys in one panel of the cache
TILE = 64  # keys that are computed together
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class CacheStruct(Structure):
    """Keys and values of one layer."""

    _fields_ = (
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_scale", c_void_p),
        ("value_scale", c_void_p),
        ("panels", c_int64),
        ("heads", c_int32),
        ("head_dim", c_int32),
        ("storage", c_int32),
    )


class PositionalStruct(Structure):
    """The part of the scores that depends on positions only."""

    _fields_ = (
        ("channels", c_int32),
        ("knots", c_int32),
        ("table", c_void_p),
        ("stride", c_int64),
        ("origin", c_int64),
        ("ramp", c_void_p),
        ("inverse_norm", c_void_p),
        ("knot", c_void_p),
        ("offset", c_void_p),
        ("slope", c_void_p),
    )


class EncodingStruct(Structure):
    """One layer's score function, in units of log 2."""

    _fields_ = (
        ("query_scale", c_float),
        ("width", c_int32),
        ("kernel", c_int32),
        ("inputs", c_int32),
        ("keeps_scores", c_int32),
        ("keeps_bias", c_int32),
        ("first", c_void_p),
        ("hidden_bias", c_void_p),
        ("second", c_void_p),
        ("out_bias", c_void_p),
        ("positional", PositionalStruct),
    )


class AttentionStruct(Structure):
    """One call: queries of a ragged batch, cache, score function and results."""

    _fields_ = (
        ("cache", CacheStruct),
        ("encoding", EncodingStruct),
        ("query", c_void_p),
        ("query_row_stride", c_int64),
        ("query_head_stride", c_int64),
        ("output", c_void_p),
        ("lse", c_void_p),
        ("query_type", c_int32),
        ("threads", c_int32),
        ("sequences", c_int64),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("panels_per_block", c_int64),
        ("rank", c_int64),
        ("ranks", c_int64),
        ("stripe", c_int64),
    )


class LinearStruct(Structure):
    """A linear layer with packed weights."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("storage", c_int32),
    )


class TallyStruct(Structure):
    """Where the tally of a linear layer goes."""

    _fields_ = (
        ("target", c_void_p),
        ("mark", c_void_p),
        ("own", c_void_p),
        ("peak", c_void_p),
        ("total", c_void_p),
        ("above", c_void_p),
        ("best", c_void_p),
        ("best_id", c_void_p),
        ("parts", c_int64),
    )


class NormStruct(Structure):
    """The weights of a layer norm."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class LayerStruct(Structure):
    """One pre-norm block."""

    _fields_ = (
        ("attention_norm", NormStruct),
        ("mlp_norm", NormStruct),
        ("query_key_value", LinearStruct),
        ("dense", LinearStruct),
        ("up", LinearStruct),
        ("down", LinearStruct),
        ("cache", CacheStruct),
        ("encoding", EncodingStruct),
    )


class DecoderStruct(Structure):
    """All layers of a model and the norm behind them."""

    _fields_ = (
        ("layers", POINTER(LayerStruct)),
        ("num_layers", c_int64),
        ("norm", NormStruct),
        ("hidden", c_int64),
        ("epsilon", c_float),
        ("parallel_residual", c_int32),
        ("type", c_int32),
        ("gelu_tanh", c_int32),
    )


class AdapterStruct(Structure):
    """The score network of one layer on a block of pairs, in training."""

    _fields_ = (
        ("first", c_void_p),
        ("second", c_void_p),
        ("scores", c_void_p),
        ("hidden", c_void_p),
        ("sequences", c_int64),
        ("pairs", c_int64),
        ("heads", c_int32),
        ("width", c_int32),
        ("keeps_scores", c_int32),
        ("type", c_int32),
        ("threads", c_int32),
    )


class AdapterGradientsStruct(Structure):
    """Gradients in the results of an `AdapterStruct`, and where those in what they are made of go."""

    _fields_ = (
        ("adapted", c_void_p),
        ("scores", c_void_p),
        ("hidden", c_void_p),
        ("first", c_void_p),
        ("second", c_void_p),
        ("parts", c_int64),
    )


# In the order of abi.h.
STRUCTS = (
    CacheStruct,
    PositionalStruct,
    EncodingStruct,
    AttentionStruct,
    LinearStruct,
    TallyStruct,
    NormStruct,
    LayerStruct,
    DecoderStruct,
    AdapterStruct,
    AdapterGradientsStruct,
)


class LibraryMissingError(Exception):
    """There is no library for this machine; the message says why and how to get it."""


@cache
def load() -> CDLL:
    """Return the library, opened once.

    Raises:
        LibraryMissingError: it was not built, cannot be opened, or was built from other sources.
        ValueError: DAPE_CPU_ISA is wrong.
    """
    path = Path(os.environ.get("DAPE_CPU_LIBRARY") or Path(__file__).with_name("libdape_cpu.so"))
    if not path.exists():
        raise LibraryMissingError(f"{path.name} was not built; install g++, then dape-serve again")
    try:
        library = CDLL(str(path))
    except OSError as error:
        raise LibraryMissingError(f"{path} cannot be opened: {error}") from error
    if _struct_sizes(library) != [sizeof(struct) for struct in STRUCTS]:
        raise LibraryMissingError(f"{path} was built from other sources; install dape-serve again")
    library.dape_isa.restype = c_char_p
    library.dape_set_isa.argtypes = (c_char_p,)
    library.dape_attend.argtypes = (POINTER(AttentionStruct),)
    library.dape_decode.argtypes = (
        POINTER(DecoderStruct),
        POINTER(AttentionStruct),
        c_int64,
        c_int64,
        c_void_p,
        c_void_p,
    )
    library.dape_linear.argtypes = (
        POINTER(LinearStruct),
        c_void_p,
        c_int32,
        c_int64,
        c_int64,
        c_void_p,
        c_int32,
    )
    library.dape_linear.restype = None
    library.dape_tally.argtypes = (*library.dape_linear.argtypes[:5], POINTER(TallyStruct), c_int32)
    library.dape_tally.restype = None
    library.dape_write.argtypes = (
        POINTER(CacheStruct),
        *(c_void_p, c_void_p, c_int32),
        *(c_int64, c_int64, c_int64, c_int64),
        *(c_void_p, c_int64, c_int32),
    )
    library.dape_write.restype = None
    library.dape_read.argtypes = (POINTER(CacheStruct), c_void_p, c_int64, c_void_p, c_void_p)
    library.dape_read.restype = None
    library.dape_adapt.argtypes = (POINTER(AdapterStruct), c_void_p)
    library.dape_adapt_backward.argtypes = (POINTER(AdapterStruct), POINTER(AdapterGradientsStruct))
    _choose(library, os.environ.get("DAPE_CPU_ISA") or "auto", "DAPE_CPU_ISA")
    return library


def instruction_set() -> str:
    """Return the one of `BUILDS` that is in use; see `load`."""
    name: bytes = load().dape_isa()
    return name.decode()


def multiplies_bfloat16() -> bool:
    """Return whether bfloat16 is multiplied as such, not widened to float32."""
    return instruction_set().endswith(("+amx", "+bf16"))


def set_instruction_set(name: str) -> None:
    """Use an instruction set or one of `BUILDS` from now on; "auto" is the best one.

    Raises:
        ValueError: no such instruction set, or this processor or build lacks it.
        LibraryMissingError: see `load`.
    """
    _choose(load(), name, "instruction set")


def _struct_sizes(library: CDLL) -> list[int] | None:
    """Return the bytes of the structures that the library takes; None if it is too old to say."""
    sizes = (c_int64 * len(STRUCTS))()
    try:
        library.dape_struct_sizes(sizes)
    except AttributeError:
        return None
    return list(sizes)


def _choose(library: CDLL, name: str, setting: str) -> None:
    if name not in ("auto", *INSTRUCTION_SETS, *BUILDS):
        raise ValueError(f"{setting} is {name!r}, expected one of auto, {', '.join(INSTRUCTION_SETS)}")
    if library.dape_set_isa(name.encode()):
        raise ValueError(f"{setting} is {name!r}, which this processor or this build of the library lacks")
