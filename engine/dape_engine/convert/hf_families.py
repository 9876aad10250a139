"""The four Hugging Face families: their settings, and which of their tensors makes which of ours.

Each class is its family's config.json: fields that the engine computes with, and fields that must have the
value which the engine computes with. Letters: H heads, d head size, h hidden size.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from dape_engine.convert.assemble import Rule
from dape_engine.convert.hf_tensors import bloom_slopes, interleave, mpt_slopes

Positive = Annotated[int, Field(gt=0)]
TokenId = int | list[int] | None
Epsilon = Annotated[float, Field(gt=0, lt=1)]
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
Activation = Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"]
KINDS = ("weight", "bias")
NO_BIAS = "no bias: zero"


class Family(BaseModel):
    """What all families have."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, protected_namespaces=())

    prefix: ClassVar[str] = "transformer."
    embeddings: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]] = ("lm_head.weight",)
    buffers: ClassVar[str] = r"(?!)"
    """Tensors that are no weights."""

    model_type: str
    bos_token_id: TokenId = None
    eos_token_id: TokenId = None
    tie_word_embeddings: bool = True

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return config.json of the engine, vocabulary and dtype excepted."""

    @abstractmethod
    def rules(self) -> Iterator[Rule]:
        """Yield the rules of all tensors."""

    def notes(self) -> list[str]:
        """Return what the report says of the model as a whole."""
        ends = self.eos_token_id
        return (
            [f"of the end tokens {ends} the first is used"]
            if isinstance(ends, list) and len(ends) > 1
            else []
        )

    def ignored(self, name: str) -> str:
        """Return why an unused tensor is no weight; empty where it may be one."""
        if self.tie_word_embeddings and name in self.outputs:
            return "the embeddings again"
        return "no weight, computed" if re.fullmatch(self.buffers, name) else ""

    def shared_settings(self) -> dict[str, Any]:
        """Return the settings that have the same names in all families."""
        return {
            "bos_token_id": _first(self.bos_token_id),
            "eos_token_id": _first(self.eos_token_id),
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    def outer_rules(self, norm: str, *, norm_bias: Rule | None = None) -> Iterator[Rule]:
        """Yield the rules of embeddings, last norm and output layer."""
        yield Rule("word_embeddings.weight", self.embeddings)
        yield Rule("norm.weight", f"{norm}.weight")
        yield norm_bias or Rule("norm.bias", f"{norm}.bias")
        if not self.tie_word_embeddings:
            yield Rule("final_linear.weight", self.outputs[0])


class RopeParameters(BaseModel):
    """Rotation settings as newer folders write them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rope_type: Literal["default"] = "default"
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


class GptNeox(Family):
    """GPT-NeoX and Pythia (`GPTNeoXForCausalLM`)."""

    prefix: ClassVar[str] = "gpt_neox."
    embeddings: ClassVar[str] = "embed_in.weight"
    outputs: ClassVar[tuple[str, ...]] = ("embed_out.weight", "lm_head.weight")
    buffers: ClassVar[str] = (
        r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|rotary_emb\.inv_freq"
    )

    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    intermediate_size: Positive
    max_position_embeddings: Positive
    hidden_act: Activation = "gelu"
    layer_norm_eps: Epsilon = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    rope_scaling: None = None
    rope_parameters: RopeParameters | None = None
    tie_word_embeddings: bool = False

    def settings(self) -> dict[str, Any]:
        rope = self.rope_parameters or RopeParameters()
        return {
            **self.shared_settings(),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "layer_norm_eps": self.layer_norm_eps,
            "hidden_act": ACTIVATIONS[self.hidden_act],
            "parallel_residual": self.use_parallel_residual,
            "train_length": self.max_position_embeddings,
            "max_model_len": self.max_position_embeddings,
            "position": {
                "kind": "rope",
                "base": self.rotary_emb_base if rope.rope_theta is None else rope.rope_theta,
                "fraction": self.rotary_pct
                if rope.partial_rotary_factor is None
                else rope.partial_rotary_factor,
            },
        }

    def rules(self) -> Iterator[Rule]:
        yield from self.outer_rules("final_layer_norm")
        for layer in range(self.num_hidden_layers):
            there = here = f"layers.{layer}."
            for kind in KINDS:
                yield _named(here, there, "input_layernorm", "input_layernorm", kind)
                yield _named(here, there, "post_attention_layernorm", "post_attention_layernorm", kind)
                yield _named(here, there, "mlp.linear1", "mlp.dense_h_to_4h", kind)
                yield _named(here, there, "mlp.linear2", "mlp.dense_4h_to_h", kind)
                for name, size in (
                    ("attention.query_key_value", 3 * self.hidden_size),
                    ("attention.dense", self.hidden_size),
                ):
                    if kind == "bias" and not self.attention_bias:
                        yield _zero(f"{here}{name}.bias", size)
                    else:
                        yield _named(here, there, name, name, kind)


class Bloom(Family):
    """BLOOM (`BloomForCausalLM`): ALiBi, a norm behind the embeddings, the tanh GELU."""

    embeddings: ClassVar[str] = "word_embeddings.weight"

    hidden_size: Positive = Field(validation_alias=AliasChoices("hidden_size", "n_embed"))
    n_layer: Positive = Field(validation_alias=AliasChoices("n_layer", "num_hidden_layers"))
    n_head: Positive = Field(validation_alias=AliasChoices("n_head", "num_attention_heads"))
    layer_norm_epsilon: Epsilon = 1e-5
    seq_length: Positive = 2048
    apply_residual_connection_post_layernorm: Literal[False] = False

    def settings(self) -> dict[str, Any]:
        return {
            **self.shared_settings(),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "intermediate_size": 4 * self.hidden_size,
            "layer_norm_eps": self.layer_norm_epsilon,
            "hidden_act": "gelu_tanh",
            "embedding_norm": True,
            "train_length": self.seq_length,
            "max_model_len": self.seq_length,
            "position": {"kind": "alibi"},
        }

    def rules(self) -> Iterator[Rule]:
        yield from self.outer_rules("ln_f")
        for kind in KINDS:
            yield Rule(f"embedding_norm.{kind}", f"word_embeddings_layernorm.{kind}")
        for layer in range(self.n_layer):
            there, here = f"h.{layer}.", f"layers.{layer}."
            for kind in KINDS:
                yield _named(here, there, "input_layernorm", "input_layernorm", kind)
                yield _named(here, there, "post_attention_layernorm", "post_attention_layernorm", kind)
                yield _named(here, there, "attention.query_key_value", "self_attention.query_key_value", kind)
                yield _named(here, there, "attention.dense", "self_attention.dense", kind)
                yield _named(here, there, "mlp.linear1", "mlp.dense_h_to_4h", kind)
                yield _named(here, there, "mlp.linear2", "mlp.dense_4h_to_h", kind)
            yield _slopes(layer, bloom_slopes(self.n_head))


class MptAttention(BaseModel):
    """`attn_config` of MPT."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    attn_type: Literal["multihead_attention"] = "multihead_attention"
    clip_qkv: Annotated[float, Field(gt=0)] | None = None
    softmax_scale: Annotated[float, Field(gt=0)] | None = None
    prefix_lm: Literal[False] = False
    qk_ln: Literal[False] = False
    attn_uses_sequence_id: Literal[False] = False
    alibi: Literal[True] = True
    alibi_bias_max: Annotated[float, Field(gt=0)] = 8

    @model_validator(mode="after")
    def _scale_fits_queries(self) -> MptAttention:
        if self.softmax_scale is not None and self.clip_qkv is not None:
            raise ValueError("softmax_scale cannot be combined with clip_qkv: queries carry the scale")
        return self


class Mpt(Family):
    """MPT (`MptForCausalLM`): ALiBi with its own slopes, no biases anywhere."""

    embeddings: ClassVar[str] = "wte.weight"

    d_model: Positive = Field(validation_alias=AliasChoices("d_model", "hidden_size"))
    n_heads: Positive = Field(validation_alias=AliasChoices("n_heads", "num_attention_heads"))
    n_layers: Positive = Field(validation_alias=AliasChoices("n_layers", "num_hidden_layers"))
    expansion_ratio: Positive = 4
    max_seq_len: Positive = 2048
    layer_norm_epsilon: Epsilon = 1e-5
    attn_config: MptAttention = MptAttention()
    logit_scale: None = None
    no_bias: Literal[True] = True
    # Low precision concerns the arithmetic of training; the norm is the same.
    norm_type: Literal["low_precision_layernorm", "layernorm"] = "low_precision_layernorm"

    def settings(self) -> dict[str, Any]:
        return {
            **self.shared_settings(),
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "intermediate_size": self.expansion_ratio * self.d_model,
            "layer_norm_eps": self.layer_norm_epsilon,
            "clip_qkv": self.attn_config.clip_qkv,
            "train_length": self.max_seq_len,
            "max_model_len": self.max_seq_len,
            "position": {"kind": "alibi"},
        }

    def rules(self) -> Iterator[Rule]:
        yield from self.outer_rules("norm_f", norm_bias=_zero("norm.bias", self.d_model))
        slopes = mpt_slopes(self.n_heads, self.attn_config.alibi_bias_max)
        for layer in range(self.n_layers):
            there, here = f"blocks.{layer}.", f"layers.{layer}."
            yield Rule(
                f"{here}attention.query_key_value.weight",
                f"{there}attn.Wqkv.weight",
                partial(interleave, heads=self.n_heads, factor=self._query_factor),
                note="heads together" + ("" if self._query_factor == 1 else ", softmax_scale in the queries"),
            )
            for target, source, size in (
                ("input_layernorm", "norm_1", self.d_model),
                ("attention.query_key_value", "", 3 * self.d_model),
                ("attention.dense", "attn.out_proj", self.d_model),
                ("post_attention_layernorm", "norm_2", self.d_model),
                ("mlp.linear1", "ffn.up_proj", self.expansion_ratio * self.d_model),
                ("mlp.linear2", "ffn.down_proj", self.d_model),
            ):
                if source:
                    yield _named(here, there, target, source, "weight")
                yield _zero(f"{here}{target}.bias", size)
            yield _slopes(layer, slopes)

    @property
    def _query_factor(self) -> float:
        """What queries are multiplied by, since the engine always divides by the root of d."""
        scale = self.attn_config.softmax_scale
        return 1.0 if scale is None else scale * math.sqrt(self.d_model / self.n_heads)


class Gpt2(Family):
    """GPT-2 (`GPT2LMHeadModel`): learned positions, weights stored [inputs, outputs]."""

    embeddings: ClassVar[str] = "wte.weight"
    buffers: ClassVar[str] = r"h\.\d+\.attn\.(bias|masked_bias)"

    n_embd: Positive = Field(validation_alias=AliasChoices("n_embd", "hidden_size"))
    n_layer: Positive = Field(validation_alias=AliasChoices("n_layer", "num_hidden_layers"))
    n_head: Positive = Field(validation_alias=AliasChoices("n_head", "num_attention_heads"))
    n_positions: Positive = Field(validation_alias=AliasChoices("n_positions", "max_position_embeddings"))
    n_inner: Positive | None = None
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: Epsilon = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: Literal[False] = False

    def settings(self) -> dict[str, Any]:
        return {
            **self.shared_settings(),
            "hidden_size": self.n_embd,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "intermediate_size": self.n_inner or 4 * self.n_embd,
            "layer_norm_eps": self.layer_norm_epsilon,
            "hidden_act": ACTIVATIONS[self.activation_function],
            "train_length": self.n_positions,
            "max_model_len": self.n_positions,
            "position": {"kind": "learned", "max_positions": self.n_positions},
        }

    def rules(self) -> Iterator[Rule]:
        yield from self.outer_rules("ln_f")
        yield Rule("position_embeddings.weight", "wpe.weight")
        for layer in range(self.n_layer):
            there, here = f"h.{layer}.", f"layers.{layer}."
            factor = 1.0 if self.scale_attn_weights else math.sqrt(self.n_embd / self.n_head)
            factor /= layer + 1 if self.scale_attn_by_inverse_layer_idx else 1
            for kind in KINDS:
                yield _named(here, there, "input_layernorm", "ln_1", kind)
                yield _named(here, there, "post_attention_layernorm", "ln_2", kind)
                yield Rule(
                    f"{here}attention.query_key_value.{kind}",
                    f"{there}attn.c_attn.{kind}",
                    partial(interleave, heads=self.n_head, factor=factor, transposed=True),
                    note="transposed, heads together"
                    + ("" if factor == 1 else f", queries times {factor:g}"),
                )
                for target, source in (
                    ("attention.dense", "attn.c_proj"),
                    ("mlp.linear1", "mlp.c_fc"),
                    ("mlp.linear2", "mlp.c_proj"),
                ):
                    yield _named(here, there, target, source, kind, torch.t, "transposed")


FAMILIES: dict[str, type[Family]] = {"gpt_neox": GptNeox, "bloom": Bloom, "mpt": Mpt, "gpt2": Gpt2}


def _first(token: TokenId) -> int | None:
    return next(iter(token), None) if isinstance(token, list) else token


def _named(
    here: str,
    there: str,
    target: str,
    source: str,
    kind: str,
    change: Callable[[Tensor], Tensor] | None = None,
    note: str = "",
) -> Rule:
    return Rule(f"{here}{target}.{kind}", f"{there}{source}.{kind}", change, note=note)


def _zero(target: str, size: int) -> Rule:
    return Rule(target, "", absent=partial(torch.zeros, size), note=NO_BIAS)


def _slopes(layer: int, slopes: Tensor) -> Rule:
    return Rule(
        f"layers.{layer}.attention.position.slopes", "", absent=slopes.clone, note="by the family's formula"
    )
