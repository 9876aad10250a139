"""The engine's settings, apart from the model's own."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field

from dape_engine.config import MAX_SIZE
from dape_engine.speculation import SpeculativeConfig

Positive = Annotated[int, Field(gt=0, le=MAX_SIZE)]
MAX_THREADS = 1024
MAX_RANKS = 64


def _as_json(value: Any) -> Any:
    """Read an object that was given as JSON text."""
    return json.loads(value) if isinstance(value, str) else value


class EngineOptions(BaseModel):
    """Device, precision and limits. Names follow vLLM where vLLM has the setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, the model's own on a GPU."""
    quantization: Literal["int8"] | None = None
    """int8: the layers' weights are made int8 at load, with a scale per output channel; activations stay in
    dtype, as do embeddings and the output layer."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: the weights of the model folder. dummy: random weights, for measurements; config.json and the
    tokenizer are all that is read."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """auto: the same as dtype. int8, with a scale per token and head, needs the attention backend
    cpu or triton."""
    attention_backend: Literal["auto", "reference", "chunked", "cpu", "triton", "xformers"] = "auto"
    """Attention kernel; `dape backends` lists what runs here."""
    attention_workspace: Annotated[ByteSize, Field(ge=1 << 20)] = ByteSize(64 << 20)
    """Scratch memory of one attention call, whatever the context length; 8MiB for each CPU thread."""
    yarn_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Stretch a RoPE model to so many times its train length by YaRN; its folder stays as it is."""
    max_model_len: Positive | None = None
    """Longest prompt plus completion, in tokens; by default the model's own."""
    max_num_seqs: Positive = 32
    """Sequences that run at once."""
    max_num_batched_tokens: Positive = 1024
    """Tokens of one step over all sequences."""
    max_num_queued_reqs: Positive = 256
    """Requests that may wait; further ones are refused. A quarter more for tenants of whom none waits."""
    max_num_queued_tokens: Positive = 1 << 22
    """Tokens, completions included, of the requests that may wait; beyond it as above."""
    kv_cache_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    """Size of the KV cache over all layers, e.g. 4GiB; by default 1GiB on a CPU, on a GPU what is left."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that weights, cache and all else may take together."""
    cuda_graphs: bool = True
    """On a GPU: launch decode steps as captured graphs."""
    block_size: Positive = 16
    """Tokens of one cache block."""
    context_parallel_size: Annotated[int, Field(gt=0, le=MAX_RANKS)] = 1
    """Processes of this machine over which the keys and values of every sequence are spread, each with the
    whole model and its own cache, on a GPU of its own where there are any."""
    speculative_config: Annotated[SpeculativeConfig | None, BeforeValidator(_as_json)] = None
    """Speculative decoding of requests that do not choose for themselves, as JSON:
    {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 5}."""
    threads: Annotated[int, Field(gt=0, le=MAX_THREADS)] | None = None
    """CPU threads; by default torch's choice."""
