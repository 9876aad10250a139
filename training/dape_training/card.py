"""The model card: what a model was trained on, how, and its loss curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dape_training.config import TrainingConfig
from dape_training.data import Corpus

CURVE = "loss.png"


def write_model_card(folder: Path, config: TrainingConfig, metrics: Path) -> None:
    """Write `README.md` and the loss curve into a model folder.

    Args:
        folder: the model folder.
        config: the run's settings.
        metrics: the run's `metrics.jsonl`.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    _draw_curve(folder / CURVE, training, validation)
    model = config.model
    encoding = model.position.kind if model.dape is None else f"DAPE over {model.position.kind}"
    tokens = config.steps * config.batch_size * model.train_length
    rates = f"{config.learning_rate:g} after {config.warmup_steps} steps"
    note = f": {config.data_note}" if config.data_note else ""
    files = dict.fromkeys(Corpus.of(config.train_data).files)
    texts = ", ".join(f"`{path.parent.name}/{path.name}`" for path in files)
    begun = "" if config.initial_weights is None else f", from the weights of {config.initial_weights.name}"
    final = f"{validation[-1][1]:.4f}" if validation else "not measured"
    (folder / "README.md").write_text(
        f"""# {folder.name if folder.name != "model" else folder.parent.name}

A decoder in the GPT-NeoX form with {encoding}: {model.num_hidden_layers} layers, hidden size
{model.hidden_size}, {model.num_attention_heads} heads, vocabulary {model.vocab_size}.

| | |
|---|---|
| licence of the weights | {config.license} |
| training text | {texts}{note} |
| train length | {model.train_length} tokens |
| steps | {config.steps} of {config.batch_size} windows: {tokens / 1e6:.1f} M tokens{begun} |
| optimiser | AdamW, betas {config.betas[0]} and {config.betas[1]}, weight decay {config.weight_decay} |
| learning rate | {rates}, cosine to {config.min_learning_rate:g} |
| precision | {"bfloat16 products, float32 weights" if config.precision == "bf16" else "float32"} |
| seed | {config.seed} |
| final validation loss | {final} nats a token at the train length |

![loss by step]({CURVE})
"""
    )


def _draw_curve(
    path: Path, training: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for label, points, style in (("training", training, "-"), ("validation", validation, "o-")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
