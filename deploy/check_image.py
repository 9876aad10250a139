"""Builds the Dockerfile without a daemon, lets the image serve, and checks its promises.

Usage: check_image.py FOLDER [--port PORT]

Needs root, buildah and debootstrap (`apt install buildah debootstrap`), and of Python the standard library.
No registry of images is asked: a plain Debian stands in for python:3.11-slim. FOLDER keeps it for the next
time, together with what was built. Packages come from where this machine's pip takes them.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trial import TrialError, trial

REPOSITORY = Path(__file__).resolve().parent.parent
DEBIAN = "bookworm"
"""The release whose own Python is a 3.11."""
BASE = "docker.io/library/python:3.11-slim"
IMAGE = "localhost/dape-serve"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
"""Where Debian has them."""
SOURCES = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy")
"""pip's settings that say where packages come from."""
FORBIDDEN = ("g++", "gcc", "cc")
MIB = 1 << 20


class Buildah:
    """buildah with a store of its own.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Path):
        self._command = ["buildah", f"--root={folder}/store", f"--runroot={folder}/run"]

    def command(self, *arguments: str) -> list[str]:
        """Return the whole command line."""
        return [*self._command, *arguments]

    def ask(self, *arguments: str) -> str:
        """Run a command and return what it says; its log goes to stderr.

        Raises:
            TrialError: it failed.
        """
        done = subprocess.run(self.command(*arguments), stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise TrialError(f"`buildah {' '.join(arguments)}` ended with {done.returncode}")
        return done.stdout.strip()

    def runs(self, container: str, *command: str) -> bool:
        """Return whether a command in a container ends with 0."""
        line = self.command("run", "--isolation=chroot", "--network=host", container, "--", *command)
        return subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def make_base(buildah: Buildah, folder: Path) -> None:
    """Make an image of Debian's Python under the name of the official one, unless it is there."""
    if BASE in buildah.ask("images", "--format={{.Name}}:{{.Tag}}").split():
        return
    root = folder / "debian"
    packages = "--include=ca-certificates,python3,python3-pip"
    bootstrap = ["debootstrap", "--variant=minbase", packages, DEBIAN, str(root)]
    if subprocess.run(bootstrap, stdout=sys.stderr, check=False).returncode:
        raise TrialError(f"`{' '.join(bootstrap)}` failed")
    (root / "usr/bin/python").symlink_to("python3")
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    container = buildah.ask("from", "scratch")
    buildah.ask("copy", "--quiet", container, str(root), "/")
    path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
    # Debian's pip refuses to touch Debian's Python, the official image's does as it is told.
    buildah.ask("config", f"--env={path}", "--env=PIP_BREAK_SYSTEM_PACKAGES=1", container)
    buildah.ask("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)


def package_sources(folder: Path) -> list[str]:
    """Return options of `buildah build` that give its pip and apt what this machine's have.

    Writes a pip.conf to the folder; the local folders that it names are mounted where they are here.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    # The environment, which is listed first, wins.
    pairs = (line.split("=", 1) for line in reversed(listed.splitlines()))
    settings = {key.rpartition(".")[2]: ast.literal_eval(value) for key, value in pairs}
    kept = {key: settings[key] for key in SOURCES if key in settings}
    config = configparser.RawConfigParser()
    config["global"] = {key: "\n".join(value.split()) for key, value in kept.items()}
    config["global"]["cert"] = CERTIFICATES
    with (folder / "pip.conf").open("w") as file:
        config.write(file)
    mounts = {str(folder / "pip.conf"): "/etc/pip.conf"}
    if (bundle := ssl.get_default_verify_paths().cafile) is not None:
        mounts[bundle] = CERTIFICATES
    for key, entries in kept.items():
        for address in map(urlsplit, entries.split()):
            # The pages of an index name files that lie beside it.
            local = Path(address.path).parent if key.endswith("index-url") else Path(address.path)
            if address.scheme in ("", "file") and local.is_dir():
                mounts[str(local)] = str(local)
    options = [f"--volume={here}:{there}:ro" for here, there in mounts.items()]
    # PyTorch too comes from there.
    return [*options, "--build-arg=TORCH_INDEX="] if kept else options


def check_image(folder: Path, port: int) -> dict[str, float]:
    """Return what the image and its server were measured to need.

    Raises:
        TrialError: the image cannot be built, or does not keep a promise.
    """
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            raise TrialError(f"there is no {program}; apt install {program}")
    if os.geteuid():
        raise TrialError("only root can build an image here")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    buildah = Buildah(folder)
    make_base(buildah, folder)
    started = time.monotonic()
    # The default format has no health check.
    build = ["build", "--isolation=chroot", "--network=host", "--pull-never", "--format=docker"]
    sources = package_sources(folder)
    sys.stderr.write(buildah.ask(*build, *sources, f"--tag={IMAGE}", str(REPOSITORY)) + "\n")
    figures = {"seconds_to_build": time.monotonic() - started}
    figures["image_mib"], figures["base_mib"] = (_mib(buildah, image) for image in (IMAGE, BASE))
    container = buildah.ask("from", "--pull-never", IMAGE)
    try:
        return figures | _serve(buildah, container, port, folder)
    finally:
        buildah.ask("rm", container)


def _mib(buildah: Buildah, image: str) -> float:
    manifest = json.loads(json.loads(buildah.ask("inspect", "--type=image", image))["Manifest"])
    layers: list[int] = [layer["size"] for layer in manifest["layers"]]
    return sum(layers) / MIB


def _serve(buildah: Buildah, container: str, port: int, folder: Path) -> dict[str, float]:
    config: dict[str, Any] = json.loads(buildah.ask("inspect", container))["Docker"]["config"]
    how, *probe = config["Healthcheck"]["Test"]
    if how != "CMD":
        raise TrialError(f"the health check is not a command: {how}")
    for program in FORBIDDEN:
        if buildah.runs(container, "sh", "-c", f"command -v {program}"):
            raise TrialError(f"the image has {program}")
    if buildah.runs(container, "test", "-w", "/usr/local"):
        raise TrialError("the image's user can write to /usr/local")
    buildah.ask("config", f"--env=DAPE_PORT={port}", container)
    if buildah.runs(container, *probe):
        raise TrialError("the health check is content without a server")
    command = buildah.command("run", "--isolation=chroot", "--network=host", container, "--")
    with trial([*command, *config["Entrypoint"], *config["Cmd"]], port, os.environ, folder) as server:
        seconds = server.first_answer()
        if not buildah.runs(container, *probe):
            raise TrialError("the health check fails while the server answers")
        pid = server.pid("dape")
        if Path(f"/proc/{pid}").stat().st_uid != int(config["User"]):
            raise TrialError(f"the server does not run as user {config['User']}")
        # As a container's end does it: its first process is told.
        return {"seconds_to_first_answer": seconds, **server.drain(server.pid(config["Entrypoint"][0]), pid)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    try:
        figures = check_image(arguments.folder, arguments.port)
    except TrialError as error:
        sys.exit(f"check_image: {error}")
    sys.stdout.write(json.dumps({name: round(value, 2) for name, value in figures.items()}) + "\n")
