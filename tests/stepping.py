"""Logits of a model folder by the engine's own runner, a text read in pieces of given sizes."""

from __future__ import annotations

from collections.abc import Sequence as Sizes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dape_engine.loading import load_model
from dape_engine.options import EngineOptions
from dape_engine.output_layer import logits
from dape_engine.runner import ModelRunner
from dape_engine.sequence import Sequence
from dape_engine.step import Chunk

PIECES = {"one prefill": [40], "chunks": [7, 16, 1, 13, 3], "steps": [1] * 40}
"""Ways to read 40 tokens."""


def make_runner(folder: Path, **options: Any) -> ModelRunner:
    model = load_model(folder, torch.float32, torch.device("cpu"))
    return ModelRunner(model, EngineOptions(kv_cache_memory=4 << 20, **options), model.config.max_model_len)


def stepped_logits(runner: ModelRunner, ids: Sizes[int], sizes: Sizes[int]) -> Tensor:
    """Logits [tokens, vocabulary] of all rows."""
    sequence = Sequence("r", list(ids), blocks=list(range(-(-len(ids) // runner.block_size))))
    start, found = 0, []
    for size in sizes:
        work = runner.begin([Chunk(sequence, start, size)])
        runner.advance(work, runner.num_layers)
        if runner._decoder is not None:
            found.append(runner._decoder.logits(work.hidden))
        else:
            found.append(logits(work.hidden, runner.model.final_linear.weight))
        start += size
    return torch.cat(found)
