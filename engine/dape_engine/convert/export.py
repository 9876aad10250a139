"""`dape convert --to hf`: a model folder that transformers loads too.

The folder keeps its files. Beside them comes the modeling file, whose modules have the engine's own names,
and config.json names it; so the result is still a folder that the engine serves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dape_engine.convert.result import check_target
from dape_engine.errors import ModelFolderError
from dape_engine.weights import load_config

MODELING = Path(__file__).with_name("modeling_dape.py")
AUTO_MAP = {
    "AutoConfig": f"{MODELING.stem}.DapeConfig",
    "AutoModelForCausalLM": f"{MODELING.stem}.DapeForCausalLM",
}


def export_hf(source: Path, target: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads.

    Args:
        source: a model folder.
        target: new or empty.

    Raises:
        ModelFolderError: the source is no model folder, or the target cannot be written.
    """
    check_target(target)
    load_config(source)
    try:
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
        settings |= {"model_type": "dape", "auto_map": AUTO_MAP}
        shutil.copytree(source, target, dirs_exist_ok=True)
        shutil.copy(MODELING, target)
        (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    except (OSError, shutil.Error) as error:
        raise ModelFolderError(f"cannot write {target}: {error}") from error
