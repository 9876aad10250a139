"""The log: one line for one event, named by its request, without prompts, keys and lines of others."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from dape_engine.errors import StepError
from dape_engine.request import EngineState
from dape_server.logs import JsonFormatter, LineFormatter, configure
from dape_server.metrics import Totals
from dape_server.request_context import CURRENT
from dape_server.status_line import StatusLine
from fakes import CANARY, COMPLETIONS, FakeEngine, serving

BODY = {"prompt": CANARY, "max_tokens": 2}
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 (DEBUG|INFO|WARNING|ERROR) [\w.]+( \[[^ ]+\])?: .*"
)


@pytest.fixture(params=["text", "json"])
def log(request):
    """Log in a format; give a function that returns the lines since its last call."""
    root = logging.getLogger()
    configure(request.param, "info")
    stream = io.StringIO()
    root.handlers[0].setStream(stream)

    def lines():
        written = stream.getvalue().splitlines()
        stream.seek(0)
        stream.truncate()
        for line in written:
            if request.param == "json":
                assert json.loads(line).keys() >= {"time", "level", "logger", "message"}
            else:
                assert LINE.fullmatch(line), line
        return written

    lines.kind = request.param
    return lines


def record(message, *arguments, error=None):
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("a.b", logging.INFO, "f.py", 1, message, arguments, info)


def raised(error):
    try:
        raise error
    except Exception as caught:
        return caught


def test_access_line_names_the_request(log):
    with serving(api_key=("key-of-a-tenant",)) as client:
        headers = {"Authorization": "Bearer key-of-a-tenant", "X-Request-Id": "mine"}
        client.post(COMPLETIONS, json=BODY, headers=headers)
        client.post(COMPLETIONS, json={**BODY, "n": 0}, headers=headers)
        client.post(COMPLETIONS + "?key=swordfish", json=BODY, headers={"Authorization": "Bearer swordfish"})
        client.get("/no/such/swordfish", headers=headers)
    lines = [line for line in log() if "dape_server.access" in line]
    assert len(lines) == 4
    text = "".join(lines)
    assert CANARY not in text
    assert "key-of-a-tenant" not in text
    assert "Bearer" not in text
    assert "mine" in lines[0]
    if log.kind == "json":
        first, refused, unknown, nowhere = map(json.loads, lines)
        assert first["request_id"] == "mine"
        assert (first["method"], first["route"], first["status"]) == ("POST", COMPLETIONS, 200)
        assert first["seconds"] >= 0
        assert re.fullmatch("[0-9a-f]{8}", first["tenant"])
        assert "error_code" not in first
        assert refused["error_code"] == "invalid_value"
        assert (unknown["status"], unknown["error_code"]) == (401, "invalid_api_key")
        assert "tenant" not in unknown
        assert (nowhere["route"], nowhere["status"]) == ("other", 404)


def test_access_log_can_be_off_and_probes_are_quiet(log):
    with serving(access_log=False) as client:
        client.post(COMPLETIONS, json=BODY)
    with serving() as client:
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200
        client.engine.failure = "the engine has failed"
        client.get("/health")
    (line,) = [line for line in log() if "access" in line]
    assert "503" in line


def test_name_given_in_the_body_is_logged(log):
    with serving() as client:
        client.post(COMPLETIONS, json={**BODY, "request_id": "from-the-body"})
    (line,) = [line for line in log() if "access" in line]
    assert "from-the-body" in line


@pytest.mark.parametrize("stream", [False, True])
def test_defect_is_logged_with_its_request_and_without_the_text(log, stream):
    engine = FakeEngine()
    engine.fails_with = ValueError(f"cannot read {CANARY}")
    with serving(engine) as client:
        client.post(COMPLETIONS, json={**BODY, "stream": stream}, headers={"X-Request-Id": "mine"})
    text = [line for line in log() if "has failed" in line]
    assert len(text) == 1
    assert "mine" in text[0]
    assert "ValueError" in text[0]
    assert "fakes.py" in text[0]
    assert CANARY not in text[0]


@pytest.mark.parametrize("formatter", [LineFormatter(), JsonFormatter()])
@pytest.mark.parametrize(
    "evil", ["a\nb", "a\r\nb", "\x1b[2J", "a\x00b", "a\u2028b", "a\x85b", "a\x9bb", "\ud800", "\x7f"]
)
def test_nobody_writes_lines_of_their_own(formatter, evil):
    for made in (record(evil), record("%s", evil), record("x", error=raised(RuntimeError(evil)))):
        line = formatter.format(made)
        assert line.isprintable()
        assert line.encode()


def test_messages_of_exceptions_that_may_quote_data_need_level_debug():
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    assert CANARY not in LineFormatter().format(record("x", error=raised(KeyError(CANARY))))
    line = LineFormatter().format(record("x", error=raised(RuntimeError("out of memory"))))
    assert "RuntimeError: out of memory" in line
    try:
        raise StepError("the step failed") from raised(KeyError(CANARY))
    except StepError as error:
        line = LineFormatter().format(record("x", error=error))
    assert line.index("StepError: the step failed") < line.index("KeyError")
    assert CANARY not in line
    root.setLevel(logging.DEBUG)
    assert CANARY in LineFormatter().format(record("x", error=raised(KeyError(CANARY))))


def test_lines_outside_of_requests_name_none():
    assert "request_id" not in json.loads(JsonFormatter().format(record("x")))
    token = CURRENT.set({"request_id": "r"})
    assert json.loads(JsonFormatter().format(record("x")))["request_id"] == "r"
    CURRENT.reset(token)


def test_servers_library_logs_in_the_same_form(log):
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("uvicorn.access").info("x")
    assert len(log()) == 2


class TestStatusLine:
    def state(self, running=0, waiting=0):
        return EngineState(
            running=running,
            waiting=waiting,
            waiting_tokens=0,
            free_blocks=3,
            total_blocks=4,
            cached_blocks=0,
            steps=0,
            seconds_since_progress=0.0,
            stopped=False,
        )

    def test_figures_since_the_last_line(self, log):
        totals = Totals()
        line = StatusLine(totals, lambda: self.state(2, 1), now=10.0)
        totals.steps, totals.prompt, totals.generated, totals.scored = 5, 1000, 50, 300
        totals.prefix_queries, totals.prefix_hits = 100, 40
        line.log(20.0)
        totals.steps, totals.generated = 6, 60
        line.log(25.0)
        first, second = log()
        assert (
            "prompt 100.0 tokens/s, generation 5.0 tokens/s, scored 30.0 tokens/s, running 2, waiting 1, "
            "cache 25.0%, prefix hits 40.0%"
        ) in first
        assert "prompt 0.0 tokens/s, generation 2.0 tokens/s" in second
        if log.kind == "json":
            assert json.loads(first)["generation_tokens_per_second"] == 5.0

    def test_idle_engine_is_silent_after_its_last_work(self, log):
        totals = Totals()
        line = StatusLine(totals, self.state, now=0.0)
        line.log(10.0)
        totals.steps = 1
        line.log(20.0)
        line.log(30.0)
        assert len(log()) == 1
