"""The files under configs/ against a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_server.app import create_app
from dape_server.metrics import Metrics
from dape_server.run import make_server
from dape_server.settings import ServerSettings
from models import write_model

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDER = CONFIGS / "prometheus"
DASHBOARD = json.loads((CONFIGS / "grafana/dashboards/dape-serve.json").read_text())
RULES = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
METRIC = re.compile(r"(?<![\w:$\"])(?:dape:|http_|process_|up\b)[\w:]*")
SECONDS = 60


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def plain(expression):
    """Fill in what Grafana would."""
    for name, value in {"$__rate_interval": "1m", "$model": ".*", "$instance": ".*"}.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


SHOWN = {
    f"{panel['title']}: {target['legendFormat']}": plain(target["expr"])
    for panel in PANELS
    for target in panel["targets"]
}
RULED = {rule.get("record") or rule["alert"]: rule["expr"] for rule in RULES}
# No server of the test has 5xx answers, and no alert is to fire.
EMPTY = {"dape:http_errors:ratio5m", *(rule["alert"] for rule in RULES if "alert" in rule)}


@contextmanager
def serving_engine(folder):
    """Serve a small real model from a thread; yield the port."""
    metrics = Metrics("tiny")
    options = EngineOptions(kv_cache_memory="1MiB", device="cpu")
    app = create_app(AsyncEngine(folder, options, metrics), ServerSettings(access_log=False), metrics)
    server = make_server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def prometheus(folder, target):
    """Run Prometheus with the shipped files, impatient ones, on a free port; yield its address."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    shutil.copy(FOLDER / "rules.yml", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


def ask(client, url, expression):
    """Return the series of an expression, or None while Prometheus does not answer yet."""
    try:
        answer = client.get(f"{url}/api/v1/query", params={"query": expression})
    except httpx.TransportError:
        return None
    if answer.status_code == 503:
        return None
    assert answer.status_code == 200, (expression, answer.text)
    return answer.json()["data"]["result"]


@needs("promtool")
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"]
)
def test_promtool_accepts(command):
    done = subprocess.run(
        ["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.client
@needs("prometheus")
def test_every_expression_has_an_answer_from_a_real_server(tmp_path):
    model = write_model(tmp_path / "tiny")
    (tmp_path / "prometheus").mkdir()
    with (
        serving_engine(model) as port,
        prometheus(tmp_path / "prometheus", f"127.0.0.1:{port}") as url,
        httpx.Client(timeout=20) as client,
    ):
        server = f"http://127.0.0.1:{port}"
        traffic = cycle(
            [
                ("/v1/completions", {"prompt": "It was the best of times", "max_tokens": 6}),
                ("/v1/perplexity", {"input": "It was the worst of times, it was the age of wisdom"}),
                ("/v1/completions", {"prompt": "It was", "max_tokens": -1}),
            ]
        )
        waiting = {name: query for name, query in (SHOWN | RULED).items() if name not in EMPTY}
        deadline = time.monotonic() + SECONDS
        while waiting and time.monotonic() < deadline:
            path, body = next(traffic)
            assert client.post(server + path, json=body).status_code in (200, 400)
            waiting = {name: query for name, query in waiting.items() if not ask(client, url, query)}
        assert waiting == {}
        for name in EMPTY:
            assert ask(client, url, RULED[name]) == [], name
        known = {
            sample.name
            for family in text_string_to_metric_families(client.get(f"{server}/metrics").text)
            for sample in family.samples
        } | {"up"}
    used = {name for query in (SHOWN | RULED).values() for name in METRIC.findall(query)}
    assert used - known - RECORDED == set()
    assert len(used) > 30


def test_dashboard_can_be_provisioned():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"} == variables
    (provider,) = yaml.safe_load((CONFIGS / "grafana/provisioning/dashboards/dape.yml").read_text())[
        "providers"
    ]
    assert provider["type"] == "file"
    (source,) = yaml.safe_load((CONFIGS / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
