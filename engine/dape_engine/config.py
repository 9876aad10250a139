"""The model's settings (`config.json`), checked in one place."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dape_kernels.encoding import FORMS

MAX_SIZE = (1 << 31) - 1
"""Of anything: products of two sizes in bytes then have a number of 64 bits."""
Positive = Annotated[int, Field(gt=0, le=MAX_SIZE)]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
MAX_LAYERS = 1024
MAX_HEADS = 64
MAX_HEAD_DIM = 256
MAX_DAPE_WIDTH = 128
MAX_SINUSOIDS = 1 << 16

Kind = Literal[
    "nope",
    "alibi",
    "kerple",
    "kerple_power",
    "fire",
    "t5",
    "sandwich",
    "rope",
    "cope",
    "learned",
    "sinusoidal",
    "bipe",
]
# Encodings that act on the embeddings, on q and k, or not at all: DAPE then sees scores only.
WITHOUT_BIAS = frozenset({"nope", "rope", "learned", "sinusoidal"})


class PositionConfig(BaseModel):
    """A static positional encoding and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    mlp_width: Positive = 32
    """FIRE: width of the network that maps the normalised distance to the biases."""
    init_length: Positive = 64
    """FIRE: initial value of the threshold L below which the query position does not matter."""
    dimension: Annotated[int, Field(gt=0, le=MAX_SINUSOIDS)] = 128
    """Sandwich: number of sinusoids, times two."""
    base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10000.0
    """RoPE: base of the frequencies."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """RoPE: share of the head size that is rotated."""
    max_positions: Positive = 64
    """CoPE: number of content positions. Learned: length of the table."""
    yarn_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """RoPE: evaluate at so many times the train length by YaRN (Peng et al. 2024)."""
    segment_tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """BiPE: the tokens that end a segment. Training fills them in where there are none: all tokens of the
    tokenizer that hold a newline or end a sentence."""

    @model_validator(mode="after")
    def _settings_fit_kind(self) -> PositionConfig:
        for name, kind, given in (
            ("yarn_factor", "rope", self.yarn_factor is not None),
            ("segment_tokens", "bipe", bool(self.segment_tokens)),
        ):
            if given and self.kind != kind:
                raise ValueError(f"{name} is a setting of kind {kind!r}, got kind {self.kind!r}")
        return self


class DapeConfig(BaseModel):
    """The data-adaptive part of the encoding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1, 2] = 1
    width: Annotated[int, Field(gt=0, le=MAX_DAPE_WIDTH)] = 32
    kernel: Annotated[int, Field(gt=0, le=15)] = 1
    form: str = "concat_residual"
    right_edge: Literal["extended", "official"] = "extended"

    @field_validator("form")
    @classmethod
    def _known_form(cls, form: str) -> str:
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}, expected one of {', '.join(FORMS)}")
        return form

    @model_validator(mode="after")
    def _kernel_fits_version(self) -> DapeConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if self.version == 1 and self.kernel != 1:
            raise ValueError(f"kernel must be 1 for version 1, got {self.kernel}")
        if self.version == 2 and self.form != "concat_residual":
            raise ValueError(f"form must be 'concat_residual' for version 2, got {self.form!r}")
        return self


class ModelConfig(BaseModel):
    """A decoder in the GPT-NeoX form with its positional encoding."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    architectures: list[str] = ["DapeForCausalLM"]
    vocab_size: Positive
    hidden_size: Positive
    num_hidden_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    num_attention_heads: Annotated[int, Field(gt=0, le=MAX_HEADS)]
    intermediate_size: Positive
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    hidden_act: Literal["gelu", "gelu_tanh"] = "gelu"
    """The exact (erf) GELU, or its tanh approximation."""
    embedding_norm: bool = False
    """Whether a layer norm stands between the embeddings and the first layer (BLOOM)."""
    clip_qkv: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Queries, keys and values are cut off at plus and minus this (MPT)."""
    parallel_residual: bool = False
    tie_word_embeddings: bool = False
    train_length: Positive
    max_model_len: Positive
    bos_token_id: Annotated[int, Field(ge=0)] | None = None
    eos_token_id: Annotated[int, Field(ge=0)] | None = None
    dtype: Dtype = "float32"
    position: PositionConfig
    dape: DapeConfig | None = None

    @property
    def head_dim(self) -> int:
        """Size d of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_bias(self) -> bool:
        """Whether the static encoding is an additive bias, which DAPE reads beside the scores."""
        return self.position.kind not in WITHOUT_BIAS

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if "DapeForCausalLM" not in self.architectures:
            raise ValueError(f"architectures must hold 'DapeForCausalLM', got {self.architectures}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head size {self.head_dim} is above {MAX_HEAD_DIM}")
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} {token} is not below vocab_size {self.vocab_size}")
        if self.position.kind == "learned" and self.max_model_len > self.position.max_positions:
            raise ValueError(
                f"max_model_len {self.max_model_len} is above the {self.position.max_positions} "
                "learned positions (position.max_positions)"
            )
        if self.position.kind == "cope" and self.dape is not None:
            raise ValueError("position.kind 'cope' cannot be combined with dape")
        if self.dape is not None:
            self._form_fits(self.dape.form)
        for token in self.position.segment_tokens:
            if token >= self.vocab_size:
                raise ValueError(
                    f"position.segment_tokens: {token} is not below vocab_size {self.vocab_size}"
                )
        return self

    def _form_fits(self, form: str) -> None:
        """Refuse forms that leave parameters without use, or read a bias that is not there."""
        rule, kind = FORMS[form], self.position.kind
        if self.has_bias and not rule.feeds_bias:
            raise ValueError(f"dape.form {form!r} makes no use of the bias of position.kind {kind!r}")
        if not self.has_bias and not (rule.feeds_scores and rule.keeps_scores):
            raise ValueError(f"dape.form {form!r} needs a bias, which position.kind {kind!r} does not have")

    def with_position(self, **settings: object) -> ModelConfig:
        """Return this model with other settings of its position.

        Raises:
            pydantic.ValidationError: they do not fit.
        """
        position = {**self.position.model_dump(exclude_unset=True), **settings}
        return ModelConfig.model_validate({**self.model_dump(exclude_unset=True), "position": position})
