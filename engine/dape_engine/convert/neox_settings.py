"""The settings of a GPT-NeoX training run, from its YAML files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dape_engine.errors import ModelFolderError
from dape_engine.files import read_settings

Positive = Annotated[int, Field(gt=0)]
KERNEL_NAMES = ("dapev2_kernel", "capev2_kernel")


class NeoxSettings(BaseModel):
    """What the converter needs to know, and what must have the value that the engine computes with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_layers: Positive
    hidden_size: Positive
    num_attention_heads: Positive
    seq_length: Positive
    max_position_embeddings: Positive
    pos_emb: str = "learned"
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    rotary_emb_base: Annotated[float, Field(gt=1)] = 10000.0
    layernorm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    gpt_j_residual: bool = False
    gpt_j_tied: bool = False
    no_weight_tying: bool = False
    bias_gelu_fusion: bool = False
    """Besides fusing, it replaces the exact GELU by its tanh approximation."""
    use_bias_in_attn_linear: bool = True
    use_bias_in_mlp: bool = True
    model_parallel_size: Positive | None = None
    make_vocab_size_divisible_by: Positive | None = None
    mlp_width: Positive | None = None
    kernel: Positive | None = None
    """`dapev2_kernel`, or `capev2_kernel` as the published files call it."""
    vocab_file: str | None = None
    merge_file: str | None = None

    norm: Literal["layernorm"] = "layernorm"
    activation: Literal["gelu"] = "gelu"
    apply_query_key_layer_scaling: Literal[False] = False
    use_mup: Literal[False] = False
    use_qk_layernorm: Literal[False] = False
    num_kv_heads: int | None = None
    sliding_window_width: None = None
    num_unique_layers: None = None
    rpe_num_buckets: Literal[32] = 32
    rpe_max_distance: Literal[128] = 128
    opt_pos_emb_offset: Literal[0] = 0
    moe_num_experts: Literal[0, 1] = 1
    attention_config: list[tuple[list[Literal["global", "flash"]], int | Literal["all"]]] | None = None


def find_settings(folder: Path) -> list[Path]:
    """Return the YAML files of a checkpoint: in its `configs`, in itself, else beside it.

    Raises:
        ModelFolderError: there are none.
    """
    for place in (folder / "configs", folder, folder.parent / "configs", folder.parent):
        files = sorted(path for ending in ("yml", "yaml") for path in place.glob(f"*.{ending}"))
        if files:
            return files
    raise ModelFolderError(f"no training settings in or beside {folder}: give the YAML file with --settings")


def load_settings(paths: Iterable[Path]) -> NeoxSettings:
    """Join YAML files as training does and check them.

    Raises:
        SettingsError: a file does not hold settings.
        ModelFolderError: two disagree, or a setting is one that the engine does not have.
    """
    values: dict[str, Any] = {}
    shown = ""
    for path in paths:
        shown += f"{', ' if shown else ''}{path}"
        for key, value in read_settings(path).items():
            name = str(key).replace("-", "_")
            name = "kernel" if name in KERNEL_NAMES else name
            if values.setdefault(name, value) != value:
                raise ModelFolderError(f"{path}: {key} is {value!r}, and {values[name]!r} elsewhere")
    try:
        settings = NeoxSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise ModelFolderError(f"{shown}: {name}: {first['msg']}{given}") from error
    if settings.num_kv_heads not in (None, settings.num_attention_heads):
        raise ModelFolderError(
            f"{shown}: num_kv_heads: {settings.num_kv_heads} key heads for {settings.num_attention_heads} "
            "query heads are not supported"
        )
    return settings
