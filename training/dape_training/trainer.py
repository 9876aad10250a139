"""The training loop: AdamW, cosine schedule with warm-up, checkpoints, resume, validation loss.

A run folder holds `checkpoints/`, `metrics.jsonl`, tensorboard events, the tokenizer and tokens unless they
are shared, the model folder `model/` with its card, and at the end `result.json`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich import progress as bars
from tokenizers import Tokenizer
from torch import Tensor, nn

from dape_engine.errors import SettingsError
from dape_engine.loading import load_model
from dape_engine.model import DapeForCausalLM, initialise
from dape_engine.tokenizer import FILE as TOKENIZER
from dape_engine.weights import save_model_folder
from dape_kernels.dense import dense_attention
from dape_training import checkpoint
from dape_training.card import write_model_card
from dape_training.config import TrainingConfig
from dape_training.data import (
    Corpus,
    saved_tokenizer,
    saved_tokens,
    segment_tokens,
    training_batches,
    validation_batches,
)
from dape_training.files import whole_file, write_json
from dape_training.loss import linear_cross_entropy
from dape_training.run_folder import METRICS, RESULT, Progress, last_progress

logger = logging.getLogger(__name__)
VALIDATION_BATCHES = 20


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token over whole windows; the module that is distributed."""

    def __init__(self, model: DapeForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> Tensor:
        """Return the scalar loss of windows int64 [B, N + 1]."""
        encodings = [encoding.encoding() for encoding in self.model.encodings]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (t.transpose(-2, -3) for t in (query, key, value))
            return dense_attention(query, key, value, encodings[layer], segments).transpose(-2, -3)

        positions, segments = self.model.places(windows[:, :-1])
        hidden = self.model(windows[:, :-1], positions, attend)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.model.final_linear.weight, windows[:, 1:].flatten()
        )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * (1 + math.cos(math.pi * min(done, 1))) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay everything but norms and biases, as Megatron and GPT-NeoX do.

    The positional scalars decay too: without it most exponents of a Kerple model grow past 1.
    """
    # Dictionaries as ordered sets: modules may share a parameter (T5's table, tied embeddings).
    decayed: dict[nn.Parameter, None] = {}
    free: dict[nn.Parameter, None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (free if name == "bias" or isinstance(module, nn.LayerNorm) else decayed)[parameter] = None
    return [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": list(free), "weight_decay": 0.0},
    ]


def train(
    config: TrainingConfig,
    folder: Path,
    *,
    shared: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train the model of `config`, resuming from `folder` where it holds a checkpoint.

    Args:
        config: the settings; the number of steps may be raised between calls.
        folder: the run folder.
        shared: where the tokenizer and the tokens are kept; by default in the run folder.
        stop: asked after every step; on True the run saves a checkpoint and ends.

    Returns:
        Whether all steps are done.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
    set_seed(config.seed)
    with accelerator.main_process_first():
        tokenizer, tokens, validation = prepare_data(config, shared or folder)
    settings = config.model
    if settings.position.kind == "bipe" and not settings.position.segment_tokens:
        settings = settings.with_position(segment_tokens=segment_tokens(tokenizer))
    model = DapeForCausalLM(settings)
    initialise(model)
    if config.initial_weights is not None:
        _take_weights(model, config.initial_weights)
    loss_module = NextTokenLoss(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, eps=1e-8
    )
    loss_module, optimizer = accelerator.prepare(loss_module, optimizer)
    begun = checkpoint.resume(accelerator, folder)
    if begun.step:
        logger.info("resuming after step %d", begun.step)
    step = begun.step
    started = time.monotonic()
    batches = training_batches(tokens, config.model.train_length, config.batch_size, config.seed, step)
    log = RunLog(folder, config, step, accelerator.is_main_process)
    stopped = False
    with log:
        while step < config.steps and not stopped:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            windows = next(batches)[accelerator.process_index :: accelerator.num_processes]
            loss = loss_module(windows.to(accelerator.device))
            optimizer.zero_grad()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(loss_module.parameters(), config.gradient_clip)
            optimizer.step()
            step += 1
            log.step(step, float(loss.detach()), float(norm), learning_rate(config, step - 1))
            if step % config.validate_every == 0 or step == config.steps:
                log.validation(step, _validation_loss(loss_module, validation, accelerator))
            # The processes of a run have to agree.
            asked = torch.tensor(float(stop()), device=accelerator.device)
            stopped = bool(accelerator.reduce(asked, "sum"))
            if step % config.checkpoint_every == 0 or step == config.steps or stopped:
                # The model comes first: the checkpoint of the last step says that both are there.
                if accelerator.is_main_process:
                    save_model_folder(folder / "model", model, tokenizer)
                done = Progress(step, begun.seconds + time.monotonic() - started)
                checkpoint.save(accelerator, folder, done)
    finished = step >= config.steps
    if finished and accelerator.is_main_process:
        write_model_card(folder / "model", config, folder / METRICS)
        _write_result(folder, config, model)
    return finished


def prepare_data(config: TrainingConfig, folder: Path) -> tuple[Tokenizer, np.ndarray, list[Tensor]]:
    """Return tokenizer, training tokens and validation windows; tokenizer and tokens are kept in `folder`."""
    training = Corpus.of(config.train_data, config.licenses)
    # Weights are of use with the tokens that they have learned only.
    saved = config.initial_weights and config.initial_weights / TOKENIZER
    if given := config.tokenizer or saved:
        tokenizer = Tokenizer.from_file(str(given))
    else:
        tokenizer = saved_tokenizer(training, config.model.vocab_size, folder)
    if tokenizer.get_vocab_size() > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} entries, "
            f"above model.vocab_size {config.model.vocab_size}"
        )
    tokens, valid_tokens = (
        saved_tokens(data, tokenizer, folder) for data in (training, Corpus.of(config.valid_data))
    )
    logger.info("%d training tokens, %d validation tokens", len(tokens), len(valid_tokens))
    length = config.model.train_length
    return tokenizer, tokens, validation_batches(valid_tokens, length, config.batch_size, VALIDATION_BATCHES)


def _take_weights(model: DapeForCausalLM, folder: Path) -> None:
    """Copy the weights of a model folder into a model.

    Raises:
        SettingsError: they do not fit it.
        ModelFolderError: see `load_model`.
    """
    state = load_model(folder, torch.float32, torch.device("cpu")).state_dict()
    own = model.state_dict()
    sizes, others = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, state))
    wrong = sorted(name for name in sizes.keys() | others.keys() if sizes.get(name) != others.get(name))
    if wrong:
        raise SettingsError(
            f"initial_weights: {folder} does not fit the settings of `model`: {wrong[0]} has the shape "
            f"{others.get(wrong[0])}, expected {sizes.get(wrong[0])}"
        )
    model.load_state_dict(state)


def _write_result(folder: Path, config: TrainingConfig, model: nn.Module) -> None:
    """Write `result.json`, which says that the run is finished."""
    losses = [
        line["validation_loss"]
        for line in map(json.loads, (folder / METRICS).read_text().splitlines())
        if "validation_loss" in line
    ]
    write_json(
        folder / RESULT,
        {
            "steps": config.steps,
            "tokens": config.steps * config.batch_size * config.model.train_length,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": last_progress(folder).seconds,
            "validation_loss": losses[-1],
        },
    )


@torch.no_grad()
def _validation_loss(loss_module: nn.Module, batches: list[Tensor], accelerator: Accelerator) -> float:
    losses = [loss_module(batch.to(accelerator.device)) for batch in batches]
    return float(torch.stack(losses).mean())


class RunLog:
    """Progress bar, tensorboard and `metrics.jsonl` of one run."""

    def __init__(self, folder: Path, config: TrainingConfig, first_step: int, enabled: bool):
        self.folder = folder
        self.config = config
        self.first_step = first_step
        self.enabled = enabled
        self.started = time.monotonic()
        self.done = 0

    def __enter__(self) -> RunLog:
        from torch.utils.tensorboard import SummaryWriter

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
        )
        self.progress = bars.Progress(*columns, disable=not self.enabled)
        self.task = self.progress.add_task("training", total=self.config.steps, completed=self.first_step)
        self.progress.start()
        self.writer = None
        if self.enabled:
            self._forget_later_steps()
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first_step + 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def _forget_later_steps(self) -> None:
        """Drop what an earlier process wrote after its last checkpoint: those steps are taken again."""
        path = self.folder / METRICS
        if not path.exists():
            return
        # A line that was cut short has no line end.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with whole_file(path) as new:
            new.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.first_step))

    def step(self, step: int, loss: float, norm: float, rate: float) -> None:
        """Record one optimiser step."""
        self.done += 1
        self.progress.update(self.task, completed=step, description=f"loss {loss:.3f}")
        if step % 10 == 0:
            self._write(step, {"loss": loss, "gradient_norm": norm, "learning_rate": rate})

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss."""
        self._write(step, {"validation_loss": loss})
        speed = self.done / (time.monotonic() - self.started)
        logger.info("step %d: validation loss %.4f, %.2f steps/s", step, loss, speed)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        with (self.folder / METRICS).open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
