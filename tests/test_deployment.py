"""The Dockerfile and the files of deploy/ agree with the command, the application and each other."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from dape_engine.options import EngineOptions
from dape_server.cli.options import build_settings
from dape_server.cli.serve import serve
from dape_server.load.process import free_port
from dape_server.run import FLUSH_SECONDS
from dape_server.settings import ServerSettings
from fakes import FakeEngine
from live import live

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGE = f"{PROJECT['project']['name']}:{PROJECT['project']['version']}"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
OBJECTS = {entry["kind"]: entry for entry in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
POD = OBJECTS["Deployment"]["spec"]["template"]
[CONTAINER] = POD["spec"]["containers"]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
PROBES = {name: CONTAINER[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}


def last_stage():
    """Return the instructions of the image that is kept, by name; a repeated one's values are joined."""
    lines = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    found = {}
    for name, value in (line.split(None, 1) for line in lines.splitlines() if line.strip()):
        found = {} if name == "FROM" else found | {name: f"{found.get(name, '')} {value}".strip()}
    return found


STAGE = last_stage()
ENVIRONMENT = dict(pair.split("=", 1) for pair in shlex.split(STAGE["ENV"]))


def settings(monkeypatch, arguments, environment):
    """Return the server's settings as `dape serve` would read them, the image's environment included."""
    known = {parameter.envvar for parameter in serve.params}
    for name, value in (ENVIRONMENT | environment).items():
        assert name in known or not name.startswith("DAPE_"), f"{name} is nobody's variable"
        monkeypatch.setenv(name, str(value))
    command, *options = arguments
    assert command == serve.name
    given = serve.make_context("dape serve", options).params
    build_settings(EngineOptions, given)
    return build_settings(ServerSettings, given)


@pytest.fixture
def in_image(monkeypatch):
    return settings(monkeypatch, json.loads(STAGE["CMD"]), {})


@pytest.fixture
def in_kubernetes(monkeypatch):
    limits = CONTAINER["resources"]["limits"]
    environment = {
        entry["name"]: limits[entry["valueFrom"]["resourceFieldRef"]["resource"].removeprefix("limits.")]
        if "resourceFieldRef" in entry["valueFrom"]
        else "key another-key"
        for entry in CONTAINER["env"]
    }
    return settings(monkeypatch, CONTAINER["args"], environment)


@pytest.fixture
def in_compose(monkeypatch):
    return settings(monkeypatch, json.loads(STAGE["CMD"]), COMPOSE["dape"]["environment"])


def seconds(text):
    return float(text.removesuffix("s"))


def test_image_serves_everyone_on_its_port(in_image):
    assert json.loads(STAGE["ENTRYPOINT"])[-1] in PROJECT["project"]["scripts"]
    assert in_image.host == "0.0.0.0"
    assert in_image.port == int(STAGE["EXPOSE"])
    assert int(STAGE["USER"]) > 0
    policy = re.search(r"OMP_WAIT_POLICY \?= (\w+)", (ROOT / "Makefile").read_text())
    assert ENVIRONMENT["OMP_WAIT_POLICY"] == policy[1]


async def test_image_is_healthy_while_the_engine_is():
    how, command = STAGE["HEALTHCHECK"].partition("CMD")[1:]
    program, *arguments = json.loads(command)
    assert (how, program) == ("CMD", "python")

    async def exit_code(port):
        environment = {**os.environ, "DAPE_PORT": str(port)}
        pipe = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, env=environment, stdout=pipe, stderr=pipe
        )
        return await process.wait()

    engine = FakeEngine()
    async with live(engine, api_key=("key",)) as server:
        assert await exit_code(server.port) == 0
        engine.failure = "the engine has failed"
        assert await exit_code(server.port) == 1


async def test_probes_are_answered_where_they_ask(in_kubernetes):
    assert {probe["port"] for probe in PROBES.values()} == {"health"}
    assert {"http": in_kubernetes.port, "health": in_kubernetes.health_port} == PORTS
    port = free_port()
    engine = FakeEngine()
    async with live(engine, api_key=in_kubernetes.api_key, health_port=port), httpx.AsyncClient() as client:

        async def answers():
            urls = {name: f"http://127.0.0.1:{port}{probe['path']}" for name, probe in PROBES.items()}
            return {name: (await client.get(url)).status_code for name, url in urls.items()}

        assert set((await answers()).values()) == {200}
        engine.failure = "the engine has failed"
        assert set((await answers()).values()) == {503}


async def test_only_readiness_ends_with_the_drain():
    async with live(FakeEngine()) as server:
        server.server._context.lifecycle.drain()
        answers = {
            name: (await server.ask(f"GET {probe['path']} HTTP/1.1\r\nHost: test\r\n\r\n".encode())).status
            for name, probe in PROBES.items()
        }
    assert answers == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 503}


def test_kubernetes_waits_for_the_drain(in_kubernetes):
    [program, wait] = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    drain = in_kubernetes.shutdown_timeout + FLUSH_SECONDS
    assert POD["spec"]["terminationGracePeriodSeconds"] >= float(wait) + drain


def test_compose_waits_for_the_drain(in_compose):
    assert seconds(COMPOSE["dape"]["stop_grace_period"]) >= in_compose.shutdown_timeout + FLUSH_SECONDS


def test_kubernetes_finds_its_pods():
    labels = POD["metadata"]["labels"].items()
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    service = OBJECTS["Service"]
    assert service["spec"]["selector"].items() <= labels
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {"http"}
    # Otherwise a service could set DAPE_PORT.
    assert POD["spec"]["enableServiceLinks"] is False


def test_kubernetes_runs_the_image_as_it_is_meant():
    assert POD["spec"]["securityContext"]["runAsUser"] == int(STAGE["USER"])
    mounts = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounts == {volume["name"] for volume in POD["spec"]["volumes"]}


def test_one_version_is_deployed():
    assert CONTAINER["image"] == COMPOSE["dape"]["image"] == IMAGE


def test_compose_builds_with_arguments_of_the_dockerfile():
    build = COMPOSE["dape"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert build["args"].keys() <= set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.M))


def test_compose_watches_with_the_configs_as_they_are(in_compose):
    prometheus, grafana = COMPOSE["prometheus"], COMPOSE["grafana"]
    # Their configs say localhost.
    assert prometheus["network_mode"] == grafana["network_mode"] == "service:dape"
    mounted = {}
    for service in (prometheus, grafana):
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                mounted[target] = DEPLOY / source
    scraped = yaml.safe_load((mounted["/etc/prometheus"] / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"] == [{"targets": [f"localhost:{in_compose.port}"]}]
    provisioning = mounted["/etc/grafana/provisioning"]
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    published = {int(port.rpartition(":")[2]) for port in COMPOSE["dape"]["ports"]}
    assert published == {in_compose.port, urlsplit(source["url"]).port, 3000}
    [boards] = yaml.safe_load((provisioning / "dashboards/dape.yml").read_text())["providers"]
    assert list(mounted[boards["options"]["path"]].glob("*.json"))


def test_image_is_built_from_all_that_the_wheel_is_made_of():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    first, *rest = [line for line in lines if not line.startswith("#")]
    assert first == "*"
    kept = {line.removeprefix("!") for line in rest if line.startswith("!")}
    project = PROJECT["project"]
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {package.split("/")[0] for package in packages} | {project["readme"], *project["license-files"]}
    assert kept == needed | {"pyproject.toml", "constraints.txt", "hatch_build.py"}
