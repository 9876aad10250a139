"""The CHE table: results of a sweep as numbers for programs and as Markdown for readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dape_training.che.config import CheConfig, RunSettings
from dape_training.che.model import Setup
from dape_training.che.run import read_result
from dape_training.che.tasks import TASKS

Cells = Mapping[tuple[str, str], Sequence[float]]
"""Scores of all seeds by task and encoding."""
SCORES = {
    "score": "Accuracy in % above the trained lengths",
    "trained_lengths_score": "Accuracy in % at trained lengths",
}
PUBLISHED = RunSettings()
METHOD = """\
- Encoder models see |i - j| as the distance of places i and j. FIRE's normaliser uses the larger of the two.
  The published code for these tasks is not known: the released modules set the distance of later keys to 0.
- A `causal` model is the engine's decoder: placeholders see the whole input and the placeholders before them.
- Layers are those of the package: norms before attention and MLP, GELU. The reference puts norms after them
  and uses ReLU. Dropout acts on the outputs of attention and MLP, as there.
- Positions are 0, 1, 2, ... unless `max_position` is set; the paper names 2048 as the limit of randomised
  positions.
- Every encoding gets the same steps and batches and is tested on the same strings. Accuracy is the share of
  right symbols; symbols after the end of an answer are not scored.
"""


def collect(config: CheConfig, out: Path) -> dict[str, Any]:
    """Return what the sweep has found so far: settings and one entry per finished run.

    Args:
        config: the sweep.
        out: its folder.
    """
    runs = []
    for run in config.runs():
        result = read_result(out / run.folder)
        if result is None:
            continue
        training = result["training"]
        runs.append(
            {
                "setup": run.setup,
                "task": run.task,
                "encoding": run.encoding_name,
                "seed": run.seed,
                **{name: result[name] for name in (*SCORES, "accuracy")},
                **{name: training[name] for name in ("steps", "seconds", "parameters")},
                "last_loss": training["curve"][-1]["loss"],
            }
        )
    return {
        "note": config.note,
        "planned_runs": len(config.runs()),
        "settings": config.run.model_dump(),
        "runs": runs,
    }


def markdown(config: CheConfig, report: Mapping[str, Any]) -> str:
    """Return the section for readers: the budget, tables and what they say of DAPE.

    Args:
        config: the sweep.
        report: from `collect`.
    """
    runs, settings = report["runs"], config.run
    hours = sum(run["seconds"] for run in runs) / 3600
    parts = [
        "# CHE benchmark",
        "Tasks of the Chomsky hierarchy (Delétang et al. 2023; set-up of Ruoss et al. 2023): trained on "
        f"lengths 1 to {settings.train_up_to}, tested at lengths {_brief(settings.test_lengths)}. "
        "† marks tasks that need no position; Binary Multiplication is not in the DAPE paper's table.",
        config.note,
        f"{len(runs)} of {report['planned_runs']} runs are finished; training took {hours:.2f} core hours.",
        _budget(settings),
        METHOD.rstrip(),
    ]
    for setup in config.setups:
        for kind, title in SCORES.items():
            cells = _cells(runs, setup, kind)
            if cells:
                parts += [f"## {title}, {setup}", _table(config, cells)]
        parts += _comparisons(config, _cells(runs, setup, "score"))
    return "\n\n".join(part for part in parts if part) + "\n"


def _budget(settings: RunSettings) -> str:
    """Return a table of the settings that are not the published ones."""
    rows = [
        f"| {name.replace('_', ' ')} | {_brief(published)} | {_brief(ours)} |"
        for name in RunSettings.model_fields
        if (ours := getattr(settings, name)) != (published := getattr(PUBLISHED, name))
    ]
    return "\n".join(["| setting | published | here |", "|---|---|---|", *rows]) if rows else ""


def _brief(value: object) -> str:
    if isinstance(value, tuple) and value == tuple(range(value[0], value[-1] + 1)):
        return f"{value[0]} to {value[-1]}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "all" if value is None else f"{value}"


def _cells(runs: Sequence[Mapping[str, Any]], setup: Setup, kind: str) -> Cells:
    cells: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run["setup"] == setup and run[kind] is not None:
            cells.setdefault((run["task"], run["encoding"]), []).append(run[kind])
    return cells


def _table(config: CheConfig, cells: Cells) -> str:
    names = list(config.encodings)
    lines = [
        f"| level | task | chance | {' | '.join(names)} |",
        f"|---|---|---{'|---' * len(names)}|",
    ]
    for task_name in config.tasks:
        task = TASKS[task_name]
        means = {name: _mean(cells[task_name, name]) for name in names if (task_name, name) in cells}
        shown = []
        for name in names:
            if name not in means:
                shown.append("")
                continue
            text = f"{100 * means[name]:.1f}" + _error(cells[task_name, name])
            shown.append(f"**{text}**" if means[name] == max(means.values()) else text)
        mark = "" if task.needs_position else " †"
        lines.append(f"| {task.level} | {task.title}{mark} | {100 * task.chance:.0f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _error(values: Sequence[float]) -> str:
    """Return the standard error of the mean over seeds; nothing for one seed."""
    if len(values) < 2:
        return ""
    mean = _mean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f" ± {100 * math.sqrt(variance / len(values)):.1f}"


def _comparisons(config: CheConfig, cells: Cells) -> list[str]:
    """Return, for each DAPE encoding, on how many tasks that need positions it beats its static encoding."""
    lines = []
    for name, encoding in config.encodings.items():
        static = [
            other
            for other, settings in config.encodings.items()
            if settings.dape is None and settings.position == encoding.position
        ]
        if encoding.dape is None or not static:
            continue
        gains = [
            _mean(cells[task, name]) - _mean(cells[task, static[0]])
            for task in config.tasks
            if TASKS[task].needs_position and (task, name) in cells and (task, static[0]) in cells
        ]
        if gains:
            lines.append(
                f"- {name} beats {static[0]} on {sum(gain > 0 for gain in gains)} of {len(gains)} tasks "
                f"that need positions; the mean difference is {100 * _mean(gains):+.1f} points."
            )
    return ["\n".join(lines)] if lines else []
