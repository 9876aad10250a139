"""The decoder in the GPT-NeoX form: what training, serving and scoring share.

The model knows nothing of caches or batches: it hands queries, keys and values of every layer to an
`Attend` function. Letters: h hidden size, H heads, d head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dape_engine.config import ModelConfig
from dape_engine.encoding import PositionalEncoding, Rotary, sinusoids
from dape_engine.segments import split_segments
from dape_kernels.decoder import DecoderLayer, DecoderModules

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v) -> attention output; all tensors [..., tokens, H, d]."""


class Attention(nn.Module):
    """Fused QKV, interleaved per head as [H, 3, d], and the output projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.clip_qkv = config.clip_qkv
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.position = PositionalEncoding(config.position, config.dape, self.heads, config.head_dim)

    def forward(
        self, x: Tensor, positions: Tensor, rotary: Rotary | None, layer: int, attend: Attend
    ) -> Tensor:
        qkv = self.query_key_value(x)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv.unflatten(-1, (self.heads, 3, -1)).unbind(-2)
        if rotary is not None:
            query, key = rotary(query, key, positions)
        output: Tensor = self.dense(attend(layer, query, key, value).flatten(-2))
        return output


class Mlp(nn.Module):
    """h -> intermediate -> h with the exact (erf) GELU or its tanh approximation."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.approximate = "tanh" if config.hidden_act == "gelu_tanh" else "none"
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear2(functional.gelu(self.linear1(x), approximate=self.approximate))
        return output


class Layer(nn.Module):
    """One pre-norm block, sequential or with a parallel residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(
        self, x: Tensor, positions: Tensor, rotary: Rotary | None, layer: int, attend: Attend
    ) -> Tensor:
        attended = x + self.attention(self.input_layernorm(x), positions, rotary, layer, attend)
        source = x if self.parallel_residual else attended
        output: Tensor = attended + self.mlp(self.post_attention_layernorm(source))
        return output


class DapeForCausalLM(nn.Module):
    """Token ids to hidden states to logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embedding_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers: list[Layer] = nn.ModuleList(  # type: ignore[assignment]  # a list to its readers
            Layer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.final_linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        kind = config.position.kind
        if kind == "learned":
            self.position_embeddings = nn.Embedding(config.position.max_positions, config.hidden_size)
        self.rotary = None
        if kind == "rope":
            self.rotary = Rotary(config.position, config.head_dim, config.train_length)
        self.share_weights()

    def share_weights(self) -> None:
        """Let every place of a weight that the model has once refer to the first."""
        if self.config.tie_word_embeddings:
            self.final_linear.weight = self.word_embeddings.weight
        if self.config.position.kind == "t5":
            for encoding in self.encodings:
                encoding.weight = self.encodings[0].weight

    @property
    def encodings(self) -> list[PositionalEncoding]:
        """The positional parameters of each layer."""
        return [layer.attention.position for layer in self.layers]

    def decoder_modules(self) -> DecoderModules | None:
        """Return the layers and what follows them, for backends that run them all in one call.

        None where q and k or v are changed on their way from the projection to the cache: such layers are
        run one by one.
        """
        if self.rotary is not None or self.config.clip_qkv is not None:
            return None
        layers = [
            DecoderLayer(
                attention_norm=layer.input_layernorm,
                query_key_value=layer.attention.query_key_value,
                dense=layer.attention.dense,
                mlp_norm=layer.post_attention_layernorm,
                up=layer.mlp.linear1,
                down=layer.mlp.linear2,
            )
            for layer in self.layers
        ]
        return DecoderModules(
            layers,
            self.norm,
            self.final_linear,
            parallel_residual=self.config.parallel_residual,
            gelu_tanh=self.config.hidden_act == "gelu_tanh",
            dtype=self.word_embeddings.weight.dtype,
        )

    def places(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the `positions` of whole sequences int64 [..., tokens], and with BiPE their segments."""
        position = self.config.position
        if position.kind != "bipe":
            return torch.arange(token_ids.shape[-1], device=token_ids.device), None
        ends = torch.tensor(position.segment_tokens, dtype=torch.int64, device=token_ids.device)
        segments, inside = split_segments(token_ids, ends)
        return inside, segments

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Return what the first layer gets, [..., tokens, h]; arguments as of `forward`."""
        x: Tensor = self.word_embeddings(token_ids)
        if self.config.position.kind == "learned":
            x = x + self.position_embeddings(positions)
        elif self.config.position.kind in ("sinusoidal", "bipe"):
            # Sinusoids for BiPE too: a segment may be longer than any that a table was trained on.
            x = x + sinusoids(positions, self.config.hidden_size).to(x.dtype)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        return x

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            token_ids: int64 [..., tokens].
            positions: int64 [tokens], the place of each token in its sequence; with BiPE in its segment,
                [..., tokens].
            attend: the attention of one layer.

        Returns:
            [..., tokens, h].
        """
        x = self.embed(token_ids, positions)
        return self.run_layers(x, positions, attend, range(len(self.layers)))

    def run_layers(self, x: Tensor, positions: Tensor, attend: Attend, layers: range) -> Tensor:
        """Return what consecutive layers make of x [..., tokens, h], normed if the last one is among them."""
        for index in layers:
            x = self.layers[index](x, positions, self.rotary, index, attend)
        hidden: Tensor = self.norm(x) if layers.stop == len(self.layers) else x
        return hidden


def initialise(model: DapeForCausalLM) -> None:
    """Initialise as GPT-NeoX does: small_init for inputs, wang_init for residual outputs (spec of DAPE)."""
    config = model.config
    small = math.sqrt(2 / (5 * config.hidden_size))
    wang = 2 / config.num_hidden_layers / math.sqrt(config.hidden_size)
    residual_outputs = {id(m) for layer in model.layers for m in (layer.attention.dense, layer.mlp.linear2)}
    inside_encodings = {id(m) for encoding in model.encodings for m in encoding.modules()}
    for module in model.modules():
        if id(module) in inside_encodings or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        nn.init.normal_(module.weight, std=wang if id(module) in residual_outputs else small)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
