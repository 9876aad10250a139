"""One run: train a model on one task, test it by length, write both down.

Everything random at a step comes from the seed and the step's number, so a run that was killed goes on from
its checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dape_training.che.config import Run, RunSettings
from dape_training.che.model import CheModel
from dape_training.che.task import Examples
from dape_training.che.tasks import TASKS

logger = logging.getLogger(__name__)
RESULT, CHECKPOINT = "result.json", "checkpoint.pt"
CHECKPOINT_SECONDS = 30.0
# Tokens of one forward pass in a test.
TEST_TOKENS = 2**14
TRAINING, TESTING = 0, 1
Progress = Callable[[int, int], None]
"""Called with the steps done and in all."""


def perform(run: Run, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train (from the last checkpoint, if there is one), test and write the result; return it.

    Args:
        run: what to do.
        folder: of this run; made if it is missing.
        progress: see `Progress`.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = build(run)
    training = _train(model, run, folder / CHECKPOINT, progress)
    return write_result(run, folder, training, accuracy_by_length(model, run))


def build(run: Run) -> CheModel:
    """Return the model of a run with its first weights."""
    settings = run.settings
    torch.manual_seed(run.seed)
    return CheModel(
        TASKS[run.task],
        run.encoding.position,
        run.encoding.dape,
        layers=settings.layers,
        heads=settings.heads,
        hidden=settings.hidden,
        dropout=settings.dropout,
        setup=run.setup,
        longest=settings.longest,
    )


def load_trained(run: Run, folder: Path) -> CheModel:
    """Return the model of a run with the weights of its last checkpoint."""
    model = build(run)
    model.load_state_dict(_load_checkpoint(run, folder / CHECKPOINT)["model"])
    return model


def write_result(
    run: Run, folder: Path, training: dict[str, Any], accuracy: dict[int, float]
) -> dict[str, Any]:
    """Write what a run found; return it.

    Args:
        run: the run.
        folder: its folder.
        training: facts of the training.
        accuracy: by test length.
    """
    limit = run.settings.train_up_to
    known = [value for length, value in accuracy.items() if length <= limit]
    longer = [value for length, value in accuracy.items() if length > limit]
    result = {
        "run": run.model_dump(mode="json", exclude_unset=True),
        "score": sum(longer) / len(longer),
        "trained_lengths_score": sum(known) / len(known) if known else None,
        "accuracy": accuracy,
        "training": training,
    }
    _replace(folder / RESULT, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    return result


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result in a run's folder, or None while there is none."""
    path = folder / RESULT
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return result


def _train(model: CheModel, run: Run, checkpoint: Path, progress: Progress | None) -> dict[str, Any]:
    """Train up to the last step; return the facts: steps, seconds, parameters and the curve of losses."""
    settings = run.settings
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    step, seconds, curve, started = 0, 0.0, [], time.monotonic()
    if checkpoint.exists():
        state = _load_checkpoint(run, checkpoint)
        step, seconds, curve = state["step"], state["seconds"], state["curve"]
        model.load_state_dict(state["model"])
        if step < settings.steps:
            optimizer.load_state_dict(state["optimizer"])
    every = max(1, settings.steps // 100)
    recent: list[Tensor] = []
    model.train()
    saved = time.monotonic()
    while step < settings.steps:
        generator = np.random.default_rng([TRAINING, run.seed, step])
        torch.manual_seed(int(generator.integers(2**62)))
        length = int(generator.integers(1, settings.train_up_to + 1))
        examples = model.task.sample(generator, settings.batch_size, length)
        loss, right = _loss(model, examples, _positions(examples, settings, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        step += 1
        recent.append(torch.stack([loss.detach(), right]))
        if step % every == 0 or step == settings.steps:
            mean_loss, mean_right = torch.stack(recent).mean(0).tolist()
            curve.append({"step": step, "loss": mean_loss, "accuracy": mean_right})
            recent.clear()
            now = time.monotonic()
            if now - saved > CHECKPOINT_SECONDS or step == settings.steps:
                saved = now
                state = {
                    "run": run.model_dump_json(),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict() if step < settings.steps else None,
                    "step": step,
                    "seconds": seconds + now - started,
                    "curve": curve,
                }
                _replace(checkpoint, partial(torch.save, state))
            if progress is not None:
                progress(step, settings.steps)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "steps": step,
        "seconds": round(seconds + time.monotonic() - started, 1),
        "parameters": parameters,
        "curve": curve,
    }


def _loss(model: CheModel, examples: Examples, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the accuracy over all scored symbols."""
    logits = model(torch.from_numpy(examples.inputs), positions)
    scored = torch.from_numpy(examples.scored)
    logits, targets = logits[scored], torch.from_numpy(examples.targets)[scored]
    return functional.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean()


def _positions(examples: Examples, settings: RunSettings, generator: np.random.Generator) -> Tensor:
    """Return the positions [l + m] of a batch: 0, 1, 2, ... or, randomised, some of those below the limit."""
    tokens = examples.inputs.shape[1] + examples.targets.shape[1]
    if settings.max_position is None:
        return torch.arange(tokens)
    return torch.from_numpy(np.sort(generator.choice(settings.max_position, tokens, replace=False)))


@torch.no_grad()
def accuracy_by_length(model: CheModel, run: Run) -> dict[int, float]:
    """Return the accuracy by test length. All runs of a task see the same strings.

    Args:
        model: the trained model.
        run: its settings.
    """
    model.eval()
    settings, task = run.settings, model.task
    accuracy = {}
    for length in settings.test_lengths:
        generator = np.random.default_rng([TESTING, length])
        tokens = length + task.answer_length(length)
        samples = settings.test_samples
        if settings.test_pairs is not None:
            samples = min(samples, max(1, settings.test_pairs // tokens**2))
        right = scored = 0.0
        for first in range(0, samples, max(1, TEST_TOKENS // tokens)):
            count = min(max(1, TEST_TOKENS // tokens), samples - first)
            examples = task.sample(generator, count, length)
            _, share = _loss(model, examples, _positions(examples, settings, generator))
            symbols = int(examples.scored.sum())
            right += float(share) * symbols
            scored += symbols
        accuracy[length] = right / scored
    return accuracy


def _load_checkpoint(run: Run, path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if not run.trains_as(Run.model_validate_json(state["run"])):
        raise ValueError(f"{path.parent} holds a run with other settings: remove it or choose another folder")
    return state


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part."""
    new = path.with_name(f"{path.name}.new")
    write(new)
    new.replace(path)
