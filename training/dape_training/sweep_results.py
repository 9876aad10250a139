"""The numbers of a sweep in one small file for each data set, from which tables and plots are made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dape_training.files import whole_file
from dape_training.sweep import Job, Sweep
from dape_training.sweep_evaluate import POSITION_EDGES, Evaluation, Protocol, evaluations, plain

DIGITS = 5


def collect_results(
    sweep: Sweep, jobs: Sequence[Job], name: str, protocol: Protocol, folder: Path
) -> list[Path]:
    """Write `<name>-<data set>.json` for every data set and return the paths.

    A file holds one row for each scored model: its run, label, seed, cost, and the loss of every target at
    every length; and how many runs the sweep plans, so that a part of it can be told from the whole.
    """
    paths = []
    for dataset in sweep.datasets:
        own = [job for job in jobs if job.dataset == dataset]
        scored = [
            evaluation
            for job in own
            if job.finished
            for evaluation in evaluations(job)
            if evaluation.is_done(protocol)
        ]
        if not scored:
            continue
        rows = [_row(sweep, evaluation) for evaluation in scored]
        config = own[0].config
        head = {
            "sweep": name,
            "dataset": dataset,
            "protocol": plain(protocol),
            "train_length": config.model.train_length,
            "layers": config.model.num_hidden_layers,
            "hidden_size": config.model.hidden_size,
            "heads": config.model.num_attention_heads,
            "vocabulary": config.model.vocab_size,
            **{name: scored[0].job.result[name] for name in ("steps", "tokens")},
            "key_runs": _key_runs(sweep),
            "runs_planned": len(own),
            "runs_scored": sum(not evaluation.yarn for evaluation in scored),
            "targets": json.loads(scored[0].path.read_text())["targets"],
            "position_edges": POSITION_EDGES,
        }
        path = folder / f"{name}-{dataset}.json"
        with whole_file(path) as new:
            new.write_text(_one_row_a_line(head, rows))
        paths.append(path)
    return paths


def _row(sweep: Sweep, evaluation: Evaluation) -> dict[str, Any]:
    job, run = evaluation.job, sweep.runs[evaluation.job.run]
    scores = json.loads(evaluation.path.read_text())
    model = job.config.model
    return {
        "run": f"{job.run}-yarn" if evaluation.yarn else job.run,
        "label": f"{run.label} with YaRN" if evaluation.yarn else run.label,
        "static": run.static,
        "dape": model.dape.model_dump() if model.dape is not None else None,
        "seed": job.seed,
        **{name: job.result[name] for name in ("parameters", "seconds", "validation_loss")},
        "nll": {length: _rounded(losses) for length, losses in scores["nll"].items()},
        "position_nll": _rounded([fmean(losses) for losses in zip(*scores["position_nll"], strict=True)]),
    }


def _rounded(losses: Sequence[float]) -> list[float]:
    return [round(loss, DIGITS) for loss in losses]


def _one_row_a_line(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    lines = ",\n".join(json.dumps(row) for row in rows)
    return json.dumps(head)[:-1] + f',\n"rows": [\n{lines}\n]}}\n'


def _key_runs(sweep: Sweep) -> list[str]:
    """Return the runs with several seeds, or all where none has."""
    repeated = [name for name, run in sweep.runs.items() if len(run.seeds) > 1]
    return repeated or list(sweep.runs)
