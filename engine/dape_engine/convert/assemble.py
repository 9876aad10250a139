"""A model's tensors out of a checkpoint's: rules say which makes which, and a report leaves none out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dape_engine.config import ModelConfig
from dape_engine.convert.stored import Checkpoint, Stored
from dape_engine.errors import ModelFolderError
from dape_engine.model import DapeForCausalLM, initialise


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of the model and where it comes from."""

    target: str
    source: str
    change: Callable[[Tensor], Tensor] | None = None
    """What is done to the source's values."""
    absent: Callable[[], Tensor] | None = None
    """What stands in where the source has no such tensor by design; without it, the tensor is missing."""
    note: str = ""
    """What is done, for the report."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a report."""

    status: str
    """used, filled (absent by design), ignored (known to be no weight), unused or missing."""
    source: str
    target: str
    shape: list[int]
    dtype: str
    note: str = ""


@dataclass(slots=True)
class Report:
    """What became of every tensor of the checkpoint and of the model."""

    source: str
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was found out or decided about the model as a whole."""

    def add(self, status: str, source: str, target: str, tensor: Stored | Tensor, note: str) -> None:
        """Enter a tensor of the checkpoint, or one of the model that the checkpoint does not have."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.entries.append(Entry(status, source, target, list(tensor.shape), dtype, note))

    def count(self, status: str) -> int:
        """Return the number of entries with a status."""
        return sum(entry.status == status for entry in self.entries)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        counts = {status: self.count(status) for status in STATUSES}
        return {
            "source": self.source,
            "counts": counts,
            "notes": self.notes,
            "tensors": [asdict(entry) for entry in self.entries],
        }


STATUSES = ("used", "filled", "ignored", "unused", "missing")


def assemble(
    config: ModelConfig,
    checkpoint: Checkpoint,
    rules: Iterable[Rule],
    ignored: Callable[[str], str],
    report: Report,
) -> DapeForCausalLM:
    """Build a model out of a checkpoint's tensors and enter each of them in the report.

    Weights get the dtype of the settings, positional parameters float32; whole numbers stay whole. What is
    missing gets an initial value.

    Args:
        config: of the model.
        checkpoint: all tensors there are.
        rules: one per tensor of the model, those excepted that it shares.
        ignored: from the name of an unused tensor to why it is no weight, empty where it may be one.
        report: gets the entries.

    Raises:
        ModelFolderError: a tensor does not have the shape that the settings ask for.
    """
    with torch.device("meta"):
        model = DapeForCausalLM(config)
    expected, state = model.state_dict(), {}
    used: set[str] = set()
    for rule in rules:
        stored = checkpoint.get(rule.source)
        if stored is not None:
            used.add(rule.source)
            values = _changed(rule, stored.read())
            report.add("used", rule.source, rule.target, stored, rule.note)
        elif rule.absent is not None:
            values = rule.absent()
            report.add("filled", "", rule.target, values, rule.note)
        else:
            report.add("missing", rule.source, rule.target, expected[rule.target], "gets an initial value")
            continue
        shape = expected[rule.target].shape
        if values.shape != shape:
            raise ModelFolderError(
                f"tensor {rule.source} has shape {list(values.shape)}, the settings ask for {list(shape)}"
            )
        if expected[rule.target].is_floating_point() and not values.is_floating_point():
            raise ModelFolderError(f"tensor {rule.source} is {values.dtype}, expected a float type")
        if values.is_floating_point():
            narrow = ".position." not in rule.target
            values = values.to(getattr(torch, config.dtype) if narrow else torch.float32)
        state[rule.target] = values
    for name in sorted(checkpoint.keys() - used):
        reason = ignored(name)
        report.add("ignored" if reason else "unused", name, "", checkpoint[name], reason)
    if report.count("missing"):
        state = {**_initial(config), **state}
    model.load_state_dict(state, strict=False, assign=True)
    model.share_weights()
    return model


def _changed(rule: Rule, values: Tensor) -> Tensor:
    if rule.change is None:
        return values
    try:
        return rule.change(values)
    except RuntimeError as error:  # the library's own checks of shapes
        raise ModelFolderError(
            f"tensor {rule.source} has shape {list(values.shape)}, which does not fit the settings"
        ) from error


def _initial(config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of a new model, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DapeForCausalLM(config)
        initialise(model)
    model.to(getattr(torch, config.dtype))
    for encoding in model.encodings:
        encoding.float()
    return model.state_dict()


def check_report(report: Report, *, allow_missing: bool, allow_unused: bool) -> None:
    """Refuse a checkpoint that lacks tensors or holds tensors that may be weights.

    Raises:
        ModelFolderError: names the first of them and the option that goes on all the same.
    """
    for status, allowed in (("missing", allow_missing), ("unused", allow_unused)):
        names = [entry.source for entry in report.entries if entry.status == status]
        if names and not allowed:
            verb = "lacks" if status == "missing" else "holds the unknown"
            shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise ModelFolderError(
                f"{report.source} {verb} {len(names)} tensor(s): {shown} "
                f"(--allow-{status} goes on all the same)"
            )
