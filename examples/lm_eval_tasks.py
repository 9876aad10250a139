"""Run a task of your own in lm-eval, by its `local-completions`. Tasks of lm-eval go the same way, by name.

dape serve
python examples/lm_eval_tasks.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import httpx
import lm_eval
from lm_eval.tasks import TaskManager

QUESTIONS = [
    {"begin": "It was a dark and stormy", "ends": [" night", " elephant"], "right": 0},
    {"begin": "He opened the door and went", "ends": [" blue", " in"], "right": 1},
    {"begin": "“Good morning,” said the old", "ends": [" man", " seventeen"], "right": 0},
]
TASK = """
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/endings.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a small task in lm-eval.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    base_url = parser.parse_args().base_url
    # Names, lengths and the tokenizer come from the server.
    served = httpx.get(f"{base_url}/v1/models").json()["data"][0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (json.dumps(question) + "\n" for question in QUESTIONS)
        (folder / "endings.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "endings.yaml").write_text(TASK.replace("FOLDER", name), encoding="utf-8")
        outcome = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "base_url": f"{base_url}/v1/completions",
                "model": served["id"],
                "max_length": served["max_model_len"],
                "num_concurrent": 4,
            },
            tasks=["endings"],
            task_manager=TaskManager(include_path=name, include_defaults=False),
            bootstrap_iters=0,
        )
    print(f"accuracy: {outcome['results']['endings']['acc,none']:.2f}")


if __name__ == "__main__":
    main()
