"""llama.cpp's server as a peer: a model of the same shape with ALiBi, since it has no kernel for DAPE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dape_engine.bench.llama_cpp import find_program, write_bloom
from dape_engine.config import ModelConfig
from dape_server.load.process import free_port, running

PROGRAM = "llama-server"
GRAIN = 256
"""Its context of a request is a multiple of so many tokens."""


@contextmanager
def llama_server(config: ModelConfig, folder: Path, threads: int, slots: int, context: int) -> Iterator[str]:
    """Run llama-server with bfloat16 weights, its float16 cache and flash attention; yield its address.

    Args:
        config: whose shape the model gets.
        folder: for the model file.
        threads: that it computes with.
        slots: requests that it serves at once.
        context: tokens of each.

    Raises:
        SettingsError: the program or the package `gguf` is not installed, or it does not start.
    """
    program = find_program(PROGRAM)
    model = folder / "peer.gguf"
    write_bloom(config, model, with_vocabulary=True)
    port = free_port()
    cells = slots * (context // GRAIN + 1) * GRAIN
    options = {"-m": model, "-t": threads, "-tb": threads, "-fa": "on", "-np": slots, "-c": cells}
    flags = [str(part) for pair in options.items() for part in pair]
    command = [program, *flags, "--host", "127.0.0.1", "--port", str(port)]
    # With its own way of waiting: this process has another one in its environment.
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    with running(PROGRAM, command, port, "/health", own) as (url, _):
        yield url
