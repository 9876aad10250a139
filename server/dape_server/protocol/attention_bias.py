"""POST /v1/attention_bias: which query of which text, and what every head sees of each key.

Values are in nats: what the softmax takes the exponential of is `scores` + `adapted_bias`.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypeAlias

from pydantic import Field

from dape_server.limits import MAX_LISTED
from dape_server.protocol.common import Count, Positive, Prompts, Shape, Usage, WorkBody

Numbers: TypeAlias = Annotated[list[Count], Field(fail_fast=True, min_length=1, max_length=MAX_LISTED)]


class AttentionBiasRequest(WorkBody):
    """A look at one row of attention, layer by layer and head by head."""

    model: str | None = None
    """The served model's name, or none."""
    input: Prompts
    """One text, or the token ids of one."""
    query: Count | None = None
    """Position of the query in the input, from 0; by default the last. What follows it plays no part."""
    layers: Numbers | None = None
    """By default all."""
    heads: Numbers | None = None
    """By default all."""
    max_keys: Positive | None = None
    """Report at most so many keys, evenly spaced over positions 0 to `query`, both ends among them (of
    one key: the query). By default all. Scores and biases are computed from all keys in any case."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: each list of values is the base64 text of its float32 numbers, little-endian."""
    add_special_tokens: bool = True
    """Whether a text gets the tokenizer's own special tokens, such as a first one."""
    return_token_strs: bool = False
    """Also the text of the query's token and of each reported key's."""


class HeadBias(Shape):
    """What one head sees of the reported keys: one value for each, or their base64 text."""

    head: int
    scores: list[float] | str
    """A = q k / sqrt(d)."""
    static_bias: list[float] | str
    """B, of the positions alone; zeros for encodings without a bias."""
    adapted_bias: list[float] | str
    """B + f(A, B), that is all that is added to A; equal to `static_bias` for models without DAPE."""


class LayerBiases(Shape):
    """The heads of one layer, in the order asked for."""

    layer: int
    heads: list[HeadBias]


class AttentionBias(Shape):
    """The answer. Layers in the order asked for."""

    id: str
    object: Literal["attention_bias"]
    created: int
    model: str
    position_kind: str
    """The static encoding, such as "kerple"."""
    dape_version: int | None
    """1, 2, or null for models without DAPE."""
    num_layers: int
    """Of the model, as `num_heads`."""
    num_heads: int
    unit: Literal["nat"]
    query: int
    num_keys: int
    """Keys that the query sees: `query` + 1."""
    key_positions: list[int]
    query_token: NotRequired[str]
    key_tokens: NotRequired[list[str]]
    layers: list[LayerBiases]
    usage: Usage
