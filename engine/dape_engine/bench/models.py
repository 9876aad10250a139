"""Models with random weights, for speed only."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from dape_engine.config import DapeConfig, ModelConfig, PositionConfig
from dape_engine.model import DapeForCausalLM, initialise
from dape_engine.tokenizer import FILE
from dape_engine.weights import DEFAULT_MODEL, resolve_model, save_model_folder

# hidden size, layers, heads, vocabulary
RANDOM_MODELS = {"small": (384, 6, 6, 8192), "125m": (768, 12, 12, 50304)}


def write_random_model(name: str, folder: Path) -> Path:
    """Write a DAPE-Kerple model of one of `RANDOM_MODELS` and return its folder."""
    return write_shape(folder / name, *RANDOM_MODELS[name])


def model_folder(name: str, scratch: Path) -> Path:
    """Return the folder of a model: `name` itself, a shipped one, or one of `RANDOM_MODELS` in `scratch`."""
    random = name in RANDOM_MODELS and not Path(name).is_dir()
    return write_random_model(name, scratch) if random else resolve_model(name)


def write_shape(
    folder: Path, hidden: int, layers: int, heads: int, vocabulary: int, *, dape: bool = True
) -> Path:
    """Write a Kerple model of some shape, with DAPE or without, and return its folder."""
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        tie_word_embeddings=True,
        train_length=512,
        max_model_len=32768,
        dtype="bfloat16",
        position=PositionConfig(kind="kerple"),
        dape=DapeConfig(width=32) if dape else None,
    )
    model = DapeForCausalLM(config)
    initialise(model)
    save_model_folder(folder, model, Tokenizer.from_file(str(resolve_model(DEFAULT_MODEL) / FILE)))
    return folder
