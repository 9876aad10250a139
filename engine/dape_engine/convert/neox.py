"""`dape convert --from gpt-neox`: checkpoints of GPT-NeoX and of the official DAPE code.

Layers carry the same names as the engine's, so a rule is mostly an index. Indices for N layers: 0 embeddings,
2 to N + 1 layers, N + 3 norm, N + 4 output layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dape_engine.config import ModelConfig
from dape_engine.convert.assemble import Report, Rule, assemble
from dape_engine.convert.neox_files import OUTPUT, checkpoint_folder, join_ranks, read_ranks
from dape_engine.convert.neox_position import FIRST_LAYER, POSITIONS, NeoxPosition, find_position
from dape_engine.convert.neox_settings import NeoxSettings, find_settings, load_settings
from dape_engine.convert.result import ImportOptions, check_target, make_config, write_import
from dape_engine.convert.stored import Checkpoint, size_of
from dape_engine.convert.tokenizers import end_of_text, find_tokenizer
from dape_engine.encoding import PositionalEncoding
from dape_engine.errors import ModelFolderError
from dape_kernels.bias import KERPLE_MINIMUM, alibi_slopes

EMBEDDINGS = "sequential.0.word_embeddings.weight"


def import_gpt_neox(source: Path, target: Path, options: ImportOptions, report: Report) -> None:
    """Write a model folder from a checkpoint.

    Args:
        source: the folder of one step, or the folder above it with the file `latest`.
        target: of the model; new or empty.
        options: the user's choices.
        report: gets what became of every tensor, also when the import fails.

    Raises:
        ModelFolderError: the checkpoint is damaged, or it is not a model that the engine runs.
    """
    check_target(target)
    folder = checkpoint_folder(source)
    paths = options.settings or tuple(find_settings(folder))
    settings = load_settings(paths)
    report.notes.append(f"settings: {', '.join(map(str, paths))}")
    named = (settings.vocab_file, settings.merge_file)
    tokenizer = find_tokenizer(options.tokenizer, (folder, folder / "configs", folder.parent), named)
    ranks = read_ranks(folder)
    if settings.model_parallel_size not in (None, len(ranks)):
        raise ModelFolderError(
            f"model_parallel_size is {settings.model_parallel_size}, "
            f"{folder} holds the files of {len(ranks)} rank(s)"
        )
    checkpoint = join_ranks(ranks, settings)
    config, found = _config(settings, checkpoint, end_of_text(tokenizer), options)
    report.notes.append(
        f"position: {found.kind}, DAPE: {found.dape or 'none'}, model parallel size {len(ranks)}"
    )
    multiple = (settings.make_vocab_size_divisible_by or 1) * len(ranks)
    if config.vocab_size % multiple:
        report.notes.append(
            f"{config.vocab_size} embeddings are no multiple of make_vocab_size_divisible_by x ranks "
            f"= {multiple}"
        )
    rules = list(_rules(settings, config, found, checkpoint))
    model = assemble(config, checkpoint, rules, partial(_ignored, settings), report)
    write_import(target, model, tokenizer, report, options)


def _config(
    settings: NeoxSettings, checkpoint: Checkpoint, end: int | None, options: ImportOptions
) -> tuple[ModelConfig, NeoxPosition]:
    """Return the model's settings and where its positional parameters are."""
    found = find_position(settings, checkpoint)
    layers = {int(name.split(".")[1]) for name in checkpoint if ".attention.dense.weight" in name}
    if len(layers) != settings.num_layers:
        raise ModelFolderError(
            f"num_layers is {settings.num_layers}, the checkpoint has {len(layers)} layers"
        )
    learned = found.position["max_positions"] if found.kind == "learned" else None
    config = make_config(
        {
            "vocab_size": size_of(checkpoint, EMBEDDINGS, 0),
            "hidden_size": settings.hidden_size,
            "num_hidden_layers": settings.num_layers,
            "num_attention_heads": settings.num_attention_heads,
            "intermediate_size": size_of(checkpoint, _mlp_names(checkpoint, 0, "weight")[0], 0),
            "layer_norm_eps": settings.layernorm_epsilon,
            "hidden_act": "gelu_tanh" if settings.bias_gelu_fusion else "gelu",
            "parallel_residual": settings.gpt_j_residual,
            "tie_word_embeddings": not settings.no_weight_tying and _output(settings) not in checkpoint,
            "train_length": settings.seq_length,
            "max_model_len": learned or max(settings.seq_length, settings.max_position_embeddings),
            "bos_token_id": end,
            "eos_token_id": end,
            "dtype": str(checkpoint[EMBEDDINGS].dtype).removeprefix("torch."),
            "position": found.position,
            "dape": found.dape,
        },
        options,
    )
    return config, found


def _rules(
    settings: NeoxSettings, config: ModelConfig, found: NeoxPosition, checkpoint: Checkpoint
) -> Iterator[Rule]:
    last = FIRST_LAYER + settings.num_layers
    yield Rule("word_embeddings.weight", EMBEDDINGS)
    if found.kind == "learned":
        yield Rule("position_embeddings.weight", POSITIONS)
    for layer in range(settings.num_layers):
        yield from _layer_rules(settings, config, checkpoint, layer)
        yield from _position_rules(config, found, checkpoint, layer)
    for kind in ("weight", "bias"):
        yield Rule(f"norm.{kind}", f"sequential.{last + 1}.norm.{kind}")
    if not config.tie_word_embeddings:
        yield Rule(OUTPUT, _output(settings))


def _output(settings: NeoxSettings) -> str:
    return f"sequential.{FIRST_LAYER + settings.num_layers + 2}.{OUTPUT}"


def _layer_rules(
    settings: NeoxSettings, config: ModelConfig, checkpoint: Checkpoint, layer: int
) -> Iterator[Rule]:
    there, here = f"sequential.{FIRST_LAYER + layer}.", f"layers.{layer}."
    tied = settings.gpt_j_residual and settings.gpt_j_tied
    for kind in ("weight", "bias"):
        yield Rule(f"{here}input_layernorm.{kind}", f"{there}input_layernorm.{kind}")
        second = "input_layernorm" if tied else "post_attention_layernorm"
        yield Rule(f"{here}post_attention_layernorm.{kind}", f"{there}{second}.{kind}")
        up, down = _mlp_names(checkpoint, layer, kind)
        hidden, inner = config.hidden_size, config.intermediate_size
        for target, source, size, has_bias in (
            (
                "attention.query_key_value",
                f"{there}attention.query_key_value.{kind}",
                3 * hidden,
                settings.use_bias_in_attn_linear,
            ),
            ("attention.dense", f"{there}attention.dense.{kind}", hidden, settings.use_bias_in_attn_linear),
            ("mlp.linear1", up, inner, settings.use_bias_in_mlp),
            ("mlp.linear2", down, hidden, settings.use_bias_in_mlp),
        ):
            absent = None if has_bias or kind == "weight" else partial(torch.zeros, size)
            yield Rule(
                f"{here}{target}.{kind}",
                source,
                absent=absent,
                note="" if absent is None else "no bias: zero",
            )


def _mlp_names(checkpoint: Checkpoint, layer: int, kind: str) -> tuple[str, str]:
    """Return the names of a layer's MLP tensors: those of today, or those of older versions."""
    there = f"sequential.{FIRST_LAYER + layer}.mlp."
    if f"{there}dense_h_to_4h.weight" in checkpoint:
        return f"{there}dense_h_to_4h.{kind}", f"{there}dense_4h_to_h.{kind}"
    return f"{there}linear1.{kind}", f"{there}linear2.{kind}"


def _position_rules(
    config: ModelConfig, found: NeoxPosition, checkpoint: Checkpoint, layer: int
) -> Iterator[Rule]:
    """Yield the rules of one layer's positional parameters, whose names are the same here and there."""
    with torch.device("meta"):
        names = PositionalEncoding(
            config.position, config.dape, config.num_attention_heads, config.head_dim
        ).state_dict()
    there = f"sequential.{FIRST_LAYER + layer}.attention.{found.module}."
    here = f"layers.{layer}.attention.position."
    for name in names:
        rule = Rule(here + name, there + name)
        match name:
            case "slopes" if there + name not in checkpoint:
                slopes = partial(torch.tensor, alibi_slopes(config.num_attention_heads))
                rule = Rule(here + name, there + name, absent=slopes, note="by the formula")
            case "bias_p" | "bias_a":
                # In the dtype of training, as training does it.
                clamp = partial(torch.clamp_min, min=KERPLE_MINIMUM)
                rule = Rule(here + name, there + name, clamp, note=f"at least {KERPLE_MINIMUM}")
            case "weight":
                rule = _shared_table(checkpoint, found, layer, here + name, there + name)
        yield rule


def _shared_table(checkpoint: Checkpoint, found: NeoxPosition, layer: int, target: str, source: str) -> Rule:
    """Return the rule of T5's table, of which every layer may hold a copy."""
    first = f"sequential.{FIRST_LAYER}.attention.{found.module}.weight"
    if layer == 0 or source not in checkpoint:
        return Rule(target, first, note="" if layer == 0 else "shared by all layers")

    def same(table: Tensor) -> Tensor:
        if first not in checkpoint or not torch.equal(table, checkpoint[first].read()):
            raise ModelFolderError(f"tensor {source} differs from {first}: T5's table is one for all layers")
        return table

    return Rule(target, source, same, note="shared by all layers")


def _ignored(settings: NeoxSettings, name: str) -> str:
    """Return why an unused tensor is no weight; empty where it may be one."""
    if name.endswith(".inv_freq"):
        return "frequencies, computed"
    if name.endswith((".attention.bias", ".attention.masked_bias")):
        return "causal mask"
    if settings.gpt_j_tied and settings.gpt_j_residual and ".post_attention_layernorm." in name:
        return "never used: gpt_j_tied"
    return ""
