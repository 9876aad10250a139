"""A decoder in the GPT-NeoX form with data-adaptive positional encoding (DAPE), for transformers.

One file in plain PyTorch, made to be read: it stores every score, so long texts need much memory (dape-serve
runs the same folder without). Letters: B sequences, H heads, d head size, N keys, M queries, which are the
last M of the N positions.

DAPE: Zheng et al. 2024, arXiv 2405.14722; version 2: arXiv 2410.04798.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# First distance of the T5 buckets 16 to 31.
T5_STARTS = (16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)
# form -> what the network sees (scores, biases, or their sum) and which of the two is added to what it says.
FORMS = {
    "concat_residual": ("scores biases", "scores biases"),
    "concat": ("scores biases", "scores"),
    "add_residual": ("sum", "scores biases"),
    "bias_only": ("biases", "scores biases"),
    "score_only": ("scores", "scores"),
    "bias_map": ("biases", "scores"),
    "function_only": ("scores biases", ""),
}
WITHOUT_BIAS = ("nope", "rope", "learned", "sinusoidal")


class DapeConfig(PretrainedConfig):
    """The settings of config.json; `position` and `dape` are dictionaries."""

    model_type = "dape"

    def __init__(
        self,
        vocab_size=50304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        embedding_norm=False,
        clip_qkv=None,
        parallel_residual=False,
        tie_word_embeddings=False,
        max_model_len=2048,
        position=None,
        dape=None,
        use_cache=True,
        **more,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.hidden_act = hidden_act
        self.embedding_norm = embedding_norm
        self.clip_qkv = clip_qkv
        self.parallel_residual = parallel_residual
        self.max_model_len = max_model_len
        self.position = position or {"kind": "nope"}
        self.dape = dape
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **more)

    @property
    def max_position_embeddings(self):
        return self.max_model_len


class Position(nn.Module):
    """Scores [B, H, M, N] of one layer to adapted scores: static bias and DAPE network."""

    def __init__(self, config):
        super().__init__()
        position, dape, heads = config.position, config.dape, config.num_attention_heads
        self.kind, self.heads, self.dape = position["kind"], heads, dape
        self.head_dim = config.hidden_size // heads
        self.dimension = position.get("dimension", 128)
        if self.kind == "alibi":
            self.register_buffer("slopes", torch.zeros(heads))
        elif self.kind in ("kerple", "kerple_power"):
            self.bias_p = nn.Parameter(torch.ones(heads, 1, 1))
            self.bias_a = nn.Parameter(torch.ones(heads, 1, 1))
        elif self.kind == "fire":
            width = position.get("mlp_width", 32)
            self.c = nn.Parameter(torch.tensor(0.1))
            self.L_multiplier = nn.Parameter(torch.tensor(1.0))
            self.register_buffer("init_L", torch.tensor(position.get("init_length", 64)))
            activation = nn.ReLU() if dape is None else nn.LeakyReLU(0.01)
            self.mlp = nn.Sequential(nn.Linear(1, width), activation, nn.Linear(width, heads))
        elif self.kind == "t5":
            self.weight = nn.Parameter(torch.zeros(32, heads))
        elif self.kind == "cope":
            self.pos_emb = nn.Parameter(torch.zeros(1, self.head_dim, position.get("max_positions", 64)))
        if dape is not None:
            form = "score_only" if self.kind in WITHOUT_BIAS else dape.get("form", "concat_residual")
            self.sees, self.keeps = FORMS[form]
            self.reach = dape.get("kernel", 1) // 2
            self.extends = dape.get("right_edge", "extended") == "extended"
            channels = heads * len(self.sees.split())
            width = dape.get("width", 32)
            if dape.get("version", 1) == 1:
                layers = nn.Linear(channels, width), nn.Linear(width, heads)
            else:
                size = (1, dape.get("kernel", 1))
                layers = nn.Conv2d(channels, width, size), nn.Conv2d(width, heads, size)
            self.mlp2 = nn.Sequential(layers[0], nn.LeakyReLU(0.01), layers[1])

    def forward(self, scores, unscaled_query, queries, keys, visible, before, table):
        """Adapt the scores.

        Args:
            scores: [B, H, M, N], scaled, float32.
            unscaled_query: [B, H, M, d].
            queries, keys: positions [B, M] and [B, N], counted from the first real token of a sequence.
            visible: bool [B, 1, M, N], which keys a query may see.
            before: bool [B, 1, 1, N], padding on the left of a sequence.
            table: T5's weights, which the first layer has for all.
        """
        self.float()  # biases are never half precision, whatever model.half() made of them
        if self.kind == "cope":
            return scores + self.cope(scores, unscaled_query, visible)
        bias = self.bias(queries[:, :, None], keys[:, None, :], table)
        if self.dape is None:
            return scores if bias is None else scores + bias
        biases = torch.zeros_like(scores) if bias is None else bias.expand_as(scores)
        parts = {"scores": scores, "biases": biases, "sum": scores + biases}
        channels = torch.cat([parts[name] for name in self.sees.split()], 1)
        kept = sum((parts[name] for name in self.keeps.split()), torch.zeros_like(scores))
        return kept + self.network(channels, visible, before)

    def network(self, channels, visible, before):
        """The DAPE network on [B, C, M, N]; version 2 is a convolution along the keys that a query sees."""
        first, activation, last = self.mlp2
        if isinstance(first, nn.Linear):
            return self.mlp2(channels.movedim(1, -1)).movedim(-1, 1)
        r = self.reach
        # "extended": the hidden layer goes on past the last key, as it does inside a longer text.
        extra = r if self.extends else 0
        hidden = activation(first(functional.pad(channels * visible, (r, r + extra))))
        hidden = hidden * ~functional.pad(before, (0, extra))
        return last(functional.pad(hidden, (r, r - extra)))

    def bias(self, i, j, table):
        """The static bias [B, H, M, N] of queries i and keys j, float32; None without one."""
        n = (i - j).clamp_min(0)[:, None]
        if self.kind == "alibi":
            return -self.slopes.view(-1, 1, 1) * n
        if self.kind == "kerple":
            return -self.bias_p.clamp_min(0.01) * torch.log1p(self.bias_a.clamp_min(0.01) * n)
        if self.kind == "kerple_power":
            power = n.clamp_min(1).float() ** self.bias_p.clamp(0.01, 2.0)
            return torch.where(n > 0, -self.bias_a.clamp_min(0.01) * power, 0.0)
        if self.kind == "fire":
            threshold = (self.L_multiplier * self.init_L).abs()
            ratio = self.psi(n) / (self.psi(torch.maximum(i[:, None].float(), threshold)) + 1e-6)
            return self.mlp(ratio[..., None])[:, 0].movedim(-1, 1)
        if self.kind == "t5":
            far = 15 + torch.bucketize(n, torch.tensor(T5_STARTS, device=n.device), right=True)
            bucket = torch.where(n < 16, n, far)[:, 0]
            return table[bucket].movedim(-1, 1) * math.sqrt(self.head_dim)
        if self.kind == "sandwich":
            t = torch.arange(1, self.dimension // 2 + 1, device=n.device, dtype=torch.float64)
            waves = sum(torch.cos(n.double() / 10000.0 ** (2 * x / self.dimension)) for x in t)
            head = torch.arange(1, self.heads + 1, device=n.device).view(-1, 1, 1)
            return ((waves - self.dimension / 2) * self.heads / (8 * head)).float()
        return None

    def psi(self, x):
        """FIRE's logarithm."""
        return torch.log(torch.abs(self.c * x) + 1)

    def cope(self, scores, query, visible):
        """CoPE: a bias read at the sum of the gates from the key to the query."""
        gates = torch.sigmoid(scores) * visible
        place = gates.flip(-1).cumsum(-1).flip(-1).clamp_max(self.pos_emb.shape[-1] - 1)
        logits = query.float() @ self.pos_emb[0]
        floor, ceil = place.floor(), place.ceil()
        share = place - floor
        return logits.gather(-1, ceil.long()) * share + logits.gather(-1, floor.long()) * (1 - share)


class Attention(nn.Module):
    """Fused q, k, v, interleaved per head as [H, 3, d]."""

    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.clip_qkv, self.layer = config.num_attention_heads, config.clip_qkv, layer
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.position = Position(config)

    def forward(self, x, rotate, cache, places):
        qkv = self.query_key_value(x)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv.unflatten(-1, (self.heads, 3, -1)).transpose(1, 2).unbind(-2)
        query, key = rotate(query), rotate(key)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        scores = (query.float() @ key.float().transpose(-1, -2)) / math.sqrt(query.shape[-1])
        scores = self.position(scores, query, *places)
        visible = places[2]
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        output = scores.softmax(-1).to(value.dtype) @ value
        return self.dense(output.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """h -> intermediate -> h."""

    def __init__(self, config):
        super().__init__()
        self.approximate = "tanh" if config.hidden_act == "gelu_tanh" else "none"
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.linear2(functional.gelu(self.linear1(x), approximate=self.approximate))


class Layer(nn.Module):
    """One pre-norm block, sequential or with a parallel residual."""

    def __init__(self, config, layer):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x, rotate, cache, places):
        attended = x + self.attention(self.input_layernorm(x), rotate, cache, places)
        return attended + self.mlp(self.post_attention_layernorm(x if self.parallel_residual else attended))


class DapeForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model. Padding may be on the left or on the right, with an attention mask."""

    config_class = DapeConfig
    base_model_prefix = ""
    _no_split_modules = ["Layer"]
    # Biases are never half precision.
    _keep_in_fp32_modules_strict = ["position"]

    def __init__(self, config):
        super().__init__(config)
        kind = config.position["kind"]
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embedding_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        if kind == "learned":
            self.position_embeddings = nn.Embedding(config.position["max_positions"], config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        if kind == "t5":
            # One table, the first layer's.
            for layer in self.layers[1:]:
                del layer.attention.position.weight
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        if not config.tie_word_embeddings:
            self.final_linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def get_output_embeddings(self):
        return self.word_embeddings if self.config.tie_word_embeddings else self.final_linear

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        **more,
    ):
        """Logits [B, M, V] of the tokens given; keys and values of earlier ones come from the cache.

        Positions are counted from the attention mask.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            if more.get(name) is not None and more[name] is not False:
                raise ValueError(f"{name} is not supported")
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        total = past + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(len(input_ids), total, device=input_ids.device)
        real = attention_mask[:, -total:].bool()
        keys = (real.cumsum(-1) - 1).clamp_min(0)
        queries = keys[:, past:]
        place = torch.arange(total, device=input_ids.device)
        causal = place <= place[past:, None]
        # A padding row may see itself, so that its softmax is one of something.
        visible = (causal & (real[:, None] | (place == place[past:, None])))[:, None]
        before = (real.cumsum(-1) == 0)[:, None, None]

        config = self.config
        kind = config.position["kind"]
        x = self.word_embeddings(input_ids)
        if kind == "learned":
            x = x + self.position_embeddings(queries)
        elif kind == "sinusoidal":
            angle = angles(queries, config.hidden_size, 10000.0)
            x = x + torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)
        if config.embedding_norm:
            x = self.embedding_norm(x)
        table = self.layers[0].attention.position.weight if kind == "t5" else None
        rotate = self.rotation(queries)
        for layer in self.layers:
            x = layer(x, rotate, past_key_values, (queries, keys, visible, before, table))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = functional.linear(self.norm(x)[:, kept], self.get_output_embeddings().weight)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def rotation(self, positions):
        """The RoPE rotation of q and k [B, H, M, d], half-split pairing; nothing for other encodings."""
        position = self.config.position
        if position["kind"] != "rope":
            return lambda x: x
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        size = int(head_dim * position.get("fraction", 1.0))
        angle = angles(positions, size, position.get("base", 10000.0))[:, None]
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

        def rotate(x):
            first, second, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
            turned = x[..., :size] * cos + torch.cat([-second, first], -1) * sin
            return torch.cat([turned.to(x.dtype), rest], -1)

        return rotate


def angles(positions: Tensor, size: int, base: float) -> Tensor:
    """Positions [B, M] times the frequencies base^(-2t/size): [B, M, size/2]."""
    exponent = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    return positions.float()[..., None] / base**exponent
