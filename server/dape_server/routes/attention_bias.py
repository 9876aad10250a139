"""POST /v1/attention_bias: scores, static and adapted biases of one query over its keys."""

from __future__ import annotations

import base64
import time
from typing import cast

import orjson
from anyio import to_thread
from fastapi import APIRouter, Request, Response

from dape_engine.errors import ContextLengthError, RequestError
from dape_engine.inspection import Floats, Inspection, InspectionRequest
from dape_server.context import Context, ServerContext
from dape_server.json_body import JsonRoute
from dape_server.limits import MAX_BIAS_VALUES
from dape_server.protocol.attention_bias import AttentionBias, AttentionBiasRequest, HeadBias
from dape_server.scheduling import answer_id, engine_id, scheduling

router = APIRouter(route_class=JsonRoute)
KINDS = 3
"""Values of one key, head and layer: score, static bias, adapted bias."""


@router.post("/v1/attention_bias", response_model=None, responses={200: {"model": AttentionBias}})
async def create_attention_bias(
    body: AttentionBiasRequest, request: Request, context: ServerContext
) -> Response:
    """Show what one query of a text sees of its keys."""
    context.check_model(body.model)
    place = scheduling(body, request, context.settings, default_priority=1)
    answer = answer_id("bias", body, request)
    token_ids = await _token_ids(body, context)
    query = len(token_ids) - 1 if body.query is None else body.query
    config = context.engine.config
    layers = _chosen("layers", body.layers, config.num_hidden_layers)
    heads = _chosen("heads", body.heads, config.num_attention_heads)
    keys = min(query + 1, body.max_keys or query + 1)
    values = KINDS * len(layers) * len(heads) * keys
    if values > MAX_BIAS_VALUES and query < len(token_ids):
        raise RequestError(
            f"max_keys: {KINDS} values x {len(layers)} layers x {len(heads)} heads x {keys} keys = {values} "
            f"are above the limit of {MAX_BIAS_VALUES}; ask for fewer of them",
            param="max_keys",
        )
    found = await context.engine.inspect(
        InspectionRequest(engine_id(answer), token_ids, query, layers, heads, body.max_keys, place)
    )
    content = await to_thread.run_sync(_answer, answer, body, found, context, token_ids, query, heads)
    return Response(content, media_type="application/json")


async def _token_ids(body: AttentionBiasRequest, context: Context) -> tuple[int, ...]:
    """Return the token ids of the one input."""
    if len(body.input) != 1:
        raise RequestError(f"input: must be one text or its token ids, got {len(body.input)}", param="input")
    longest = context.engine.max_model_len
    (encoded,) = await context.texts.encode(
        body.input, "input", add_special_tokens=body.add_special_tokens, max_tokens=longest
    )
    if not encoded.token_ids:
        raise RequestError("input: is empty; at least 1 token is needed", param="input")
    if len(encoded.token_ids) > longest:
        raise ContextLengthError(
            f"input: {len(encoded.token_ids)} tokens are above the limit of {longest}", param="input"
        )
    return encoded.token_ids


def _chosen(field: str, wanted: list[int] | None, count: int) -> tuple[int, ...]:
    """Return the layers or heads asked for, by default all."""
    if wanted is None:
        return tuple(range(count))
    if len(set(wanted)) < len(wanted):
        raise RequestError(f"{field}: a number is given twice", param=field)
    return tuple(wanted)


def _answer(
    name: str,
    body: AttentionBiasRequest,
    found: Inspection,
    context: Context,
    token_ids: tuple[int, ...],
    query: int,
    heads: tuple[int, ...],
) -> bytes:
    """Return the answer as JSON."""
    config, tokenizer = context.engine.config, context.engine.tokenizer

    def values(row: Floats) -> list[float] | str:
        if body.encoding_format == "base64":
            return base64.b64encode(row.astype("<f4").tobytes()).decode()
        # Written below as the list of the shortest texts that read back as the same float32 numbers.
        return cast("list[float]", row)

    answer: AttentionBias = {
        "id": name,
        "object": "attention_bias",
        "created": int(time.time()),
        "model": context.model_name,
        "position_kind": config.position.kind,
        "dape_version": None if config.dape is None else config.dape.version,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "unit": "nat",
        "query": query,
        "num_keys": query + 1,
        "key_positions": list(found.keys),
        "layers": [
            {
                "layer": part.layer,
                "heads": [
                    HeadBias(
                        head=head,
                        scores=values(part.scores[place]),
                        static_bias=values(part.static_bias[place]),
                        adapted_bias=values(part.adapted_bias[place]),
                    )
                    for place, head in enumerate(heads)
                ],
            }
            for part in found.layers
        ],
        "usage": {
            "prompt_tokens": len(token_ids),
            "completion_tokens": 0,
            "total_tokens": len(token_ids),
            "prompt_tokens_details": {"cached_tokens": found.num_cached_tokens},
        },
    }
    if body.return_token_strs:
        answer["query_token"] = tokenizer.token_text(token_ids[query])
        answer["key_tokens"] = [tokenizer.token_text(token_ids[key]) for key in found.keys]
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
