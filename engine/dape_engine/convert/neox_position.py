"""The positional encoding of a GPT-NeoX checkpoint, read off the tensors of its first layer.

The training settings name the encoding, but the published ones do not always use the names that the code
knows (`capev2` stands for several), so the tensors decide and the settings must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dape_engine.convert.neox_settings import NeoxSettings
from dape_engine.convert.stored import Checkpoint, size_of
from dape_engine.errors import ModelFolderError

FIRST_LAYER = 2
"""Index of the first transformer layer."""
POSITIONS = "sequential.0.position_embeddings.weight"

# `pos_emb` of the settings, "capev" spelled "dapev": kind (None: the tensors tell) and version of DAPE.
ENCODINGS: dict[str, tuple[str | None, int | None]] = {
    "none": ("nope", None),
    "nope_c": ("nope", 1),
    "nope_c_ffn": ("nope", 2),
    "nope_dapev2": ("nope", 2),
    "alibi": ("alibi", None),
    "alibi_c": ("alibi", 1),
    "alibi_dapev2": ("alibi", 2),
    "kerple": ("kerple", None),
    "kerple_c": ("kerple", 1),
    "kerple_dapev2": ("kerple", 2),
    "fire": ("fire", None),
    "fire_c": ("fire", 1),
    "fire_dapev2": ("fire", 2),
    "dapev2": (None, 2),
    "rope_dapev1": ("rope", 1),
    "rope_dapev2": ("rope", 2),
    "rotary": ("rope", None),
    "rpe": ("t5", None),
    "cope": ("cope", None),
    "learned": ("learned", None),
    "sinusoidal": ("sinusoidal", None),
}
# The parameter by which a module is known.
KINDS = {
    "slopes": "alibi",
    "bias_p": "kerple",
    "init_L": "fire",
    "weight": "t5",
    "pos_emb": "cope",
}
NOT_POSITIONAL = ("query_key_value", "dense", "rotary_emb", "bias", "masked_bias")


@dataclass(frozen=True, slots=True)
class NeoxPosition:
    """An encoding and where its parameters are."""

    kind: str
    module: str
    """The name between `attention.` and the parameter's own; empty without parameters."""
    position: dict[str, Any]
    """`position` of the model's config.json."""
    dape: dict[str, Any] | None


def find_position(settings: NeoxSettings, checkpoint: Checkpoint) -> NeoxPosition:
    """Return the encoding of a checkpoint.

    Raises:
        ModelFolderError: it is unknown, or tensors and settings disagree.
    """
    name = settings.pos_emb.replace("capev", "dapev")
    if name not in ENCODINGS:
        raise ModelFolderError(
            f"pos_emb {settings.pos_emb!r} is not supported, expected one of {', '.join(ENCODINGS)}"
        )
    kind, version = ENCODINGS[name]
    module, shapes = _module(checkpoint)
    found = next((KINDS[key] for key in shapes if key in KINDS), None)
    if found is None:
        scores_only = "mlp2.0.weight" in shapes
        if scores_only and kind not in ("nope", "rope", None):
            raise ModelFolderError(
                f"pos_emb is {settings.pos_emb!r}, attention.{module} has no such parameters"
            )
        # Named alone ("dapev2") the module is the one that RoPE has in the official code.
        found = kind or "rope"
    if kind not in (None, found):
        raise ModelFolderError(
            f"pos_emb is {settings.pos_emb!r}, the tensors of attention.{module} are those of {found}"
        )
    dape = _dape(settings, found, module, shapes)
    if (dape["version"] if dape else None) != version:
        held = f"DAPE version {dape['version']}" if dape else "no DAPE"
        raise ModelFolderError(f"pos_emb is {settings.pos_emb!r}, the tensors are those of {held}")
    return NeoxPosition(found, module, _parameters(settings, found, module, checkpoint), dape)


def _module(checkpoint: Checkpoint) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Return the name of the first layer's positional module and the shapes of its parameters."""
    prefix = f"sequential.{FIRST_LAYER}.attention."
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in checkpoint.items():
        module, dot, parameter = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and module not in NOT_POSITIONAL:
            modules.setdefault(module, {})[parameter] = tensor.shape
    if len(modules) > 1:
        raise ModelFolderError(f"the first layer has several positional modules: {', '.join(modules)}")
    return next(iter(modules.items()), ("", {}))


def _dape(
    settings: NeoxSettings, kind: str, module: str, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    shape = shapes.get("mlp2.0.weight")
    if shape is None:
        return None
    heads = settings.num_attention_heads
    channels = heads if kind in ("nope", "rope") else 2 * heads
    if len(shape) not in (2, 4) or shape[1] != channels or (len(shape) == 4 and shape[2] != 1):
        raise ModelFolderError(
            f"attention.{module}.mlp2.0.weight has shape {list(shape)}; {kind} with {heads} heads feeds "
            f"{channels} channels"
        )
    if settings.mlp_width not in (None, shape[0]):
        raise ModelFolderError(f"mlp_width is {settings.mlp_width}, the tensors have {shape[0]}")
    if len(shape) == 2:
        return {"version": 1, "width": shape[0]}
    if settings.kernel not in (None, shape[3]):
        raise ModelFolderError(
            f"dapev2_kernel (capev2_kernel) is {settings.kernel}, the tensors have {shape[3]}"
        )
    return {"version": 2, "width": shape[0], "kernel": shape[3]}


def _parameters(settings: NeoxSettings, kind: str, module: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return `position` of config.json."""
    prefix = f"sequential.{FIRST_LAYER}.attention.{module}."
    match kind:
        case "rope":
            return {"kind": kind, "base": settings.rotary_emb_base, "fraction": settings.rotary_pct}
        case "fire":
            return {"kind": kind, "mlp_width": size_of(checkpoint, f"{prefix}mlp.0.weight", 0)}
        case "cope":
            return {"kind": kind, "max_positions": size_of(checkpoint, f"{prefix}pos_emb", 2)}
        case "learned":
            return {"kind": kind, "max_positions": size_of(checkpoint, POSITIONS, 0)}
    return {"kind": kind}
