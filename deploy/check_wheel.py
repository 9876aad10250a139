"""Installs a wheel into an empty environment and lets it serve.

Usage: check_wheel.py WHEEL FOLDER [--port PORT]

FOLDER is made for the environment, or emptied. Needs pip, and of Python the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

from trial import TrialError, trial

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
CONTENTS = (
    "dape_kernels/cpu/libdape_cpu.so",
    "dape_engine/models/dape-kerple-8m/model.safetensors",
    "dape_server/web/index.html",
)


def check_wheel(wheel: Path, folder: Path, port: int) -> dict[str, float]:
    """Return what the installed wheel's server was measured to need.

    Raises:
        TrialError: the wheel lacks something, or the server does not do its work.
    """
    if wheel.name.endswith("-any.whl"):
        raise TrialError(f"{wheel.name} was built without the C++ library: it is for any platform")
    with ZipFile(wheel) as archive:
        missing = set(CONTENTS) - set(archive.namelist())
    if missing:
        raise TrialError(f"{wheel.name} lacks {', '.join(sorted(missing))}")
    folder = folder.resolve()
    venv.create(folder, clear=True, with_pip=True)
    install: list[str | Path] = [folder / "bin/pip", "install", "--quiet", "--constraint", CONSTRAINTS, wheel]
    if subprocess.run(install, check=False).returncode:
        raise TrialError(f"pip cannot install {wheel.name}")
    # Nothing of the repository may be found by accident.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(folder / "bin/dape"), "serve", "--port", str(port)]
    with trial(command, port, environment, folder) as server:
        seconds = server.first_answer()
        backend = server.get("/version")["attention_backend"]
        if backend != "cpu":
            raise TrialError(f"the C++ library is not used: attention backend {backend}")
        pid = server.pid("dape")
        return {"seconds_to_first_answer": seconds, **server.drain(pid, pid)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    try:
        figures = check_wheel(arguments.wheel, arguments.folder, arguments.port)
    except TrialError as error:
        sys.exit(f"check_wheel: {error}")
    sys.stdout.write(json.dumps({name: round(value, 2) for name, value in figures.items()}) + "\n")
