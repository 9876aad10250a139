"""Runs lm-eval in a process of its own: `evaluate.py TASKS_FOLDER CASES.json RESULTS.json`.

It sets seeds, logging and an event loop as it likes, which is not for the tests' own process. Cases are the
arguments of the model and of `simple_evaluate`, by name; results are the samples of every task.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

tasks, cases, results = map(Path, sys.argv[1:])
manager = TaskManager(include_path=str(tasks), include_defaults=False)
found: dict[str, Any] = {}
for name, case in json.loads(cases.read_text()).items():
    outcome = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=case["model"],
        tasks=case["tasks"],
        batch_size=case["batch_size"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    found[name] = {
        "results": outcome["results"],
        "samples": {
            task: [{"doc_id": sample["doc_id"], "resps": sample["filtered_resps"]} for sample in samples]
            for task, samples in outcome["samples"].items()
        },
    }
results.write_text(json.dumps(found, default=str))
