"""A program of two processes for `test_training.py`: trains every config of a file, one after another."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dape_training.config import TrainingConfig
from dape_training.trainer import train


def main(configs: Path) -> None:
    for name, settings in json.loads(configs.read_text()).items():
        train(TrainingConfig.model_validate(settings), configs.parent / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
