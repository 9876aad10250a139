"""Keys: where they come from, what they guard, and that nothing tells them."""

from __future__ import annotations

import base64
import hmac
import logging
import re

import click
import pytest
from click.testing import CliRunner

from dape_engine.errors import SettingsError
from dape_server.app import ROUTERS, create_app
from dape_server.cli.options import build_settings, settings_options
from dape_server.keys import accepted_keys
from dape_server.settings import ServerSettings
from fakes import COMPLETIONS, FakeEngine, serving

BODY = {"prompt": "the", "max_tokens": 1}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"name:{key}".encode()).decode()}


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\n  first-key \r\n\nzweiter-schlüssel\n\n", encoding="utf-8")
    path.chmod(0o600)
    return path


def test_keys_come_from_settings_and_file(key_file, caplog):
    settings = ServerSettings(api_key=("given",), api_key_file=key_file)
    assert accepted_keys(settings) == ["given", "first-key", "zweiter-schlüssel"]
    assert accepted_keys(ServerSettings(api_key_file=key_file)) == ["first-key", "zweiter-schlüssel"]
    assert accepted_keys(ServerSettings()) == []
    assert caplog.records == []
    with serving(api_key_file=str(key_file)) as client:
        assert client.post(COMPLETIONS, json=BODY, headers=bearer("first-key")).status_code == 200
        assert client.post(COMPLETIONS, json=BODY, headers=bearer("other")).status_code == 401
        assert client.post(COMPLETIONS, json=BODY).status_code == 401


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_that_others_can_read_is_warned_of(key_file, caplog, mode):
    key_file.chmod(mode)
    assert accepted_keys(ServerSettings(api_key_file=key_file))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "chmod 600" in record.getMessage()
    assert "first-key" not in record.getMessage()


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "no key"), (b" \n\n", "no key"), (b"\xff\xfe", "UTF-8")]
)
def test_a_file_without_keys_does_not_open_the_server(tmp_path, content, reason):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=reason):
        create_app(FakeEngine(), ServerSettings(api_key_file=path))


def test_a_missing_file_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(SettingsError, match="--api-key-file"):
        build_settings(ServerSettings, {"api_key_file": tmp_path / "nothing"})
    with pytest.raises(SettingsError, match="--api-key-file"):
        build_settings(ServerSettings, {"api_key_file": tmp_path})


def test_keys_come_from_the_environment(key_file, monkeypatch):
    seen = []

    @click.command()
    @settings_options(ServerSettings)
    def command(**options):
        seen.append(accepted_keys(build_settings(ServerSettings, options)))

    monkeypatch.setenv("DAPE_API_KEY", "one two")
    monkeypatch.setenv("DAPE_API_KEY_FILE", str(key_file))
    result = CliRunner().invoke(command, [], catch_exceptions=False)
    assert result.exit_code == 0
    assert seen == [["one", "two", "first-key", "zweiter-schlüssel"]]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"])
def test_every_route_is_guarded(method):
    with serving(api_key=("key",)) as client:
        paths = {re.sub(r"{[^}]*}", "x", route.path) for router in ROUTERS for route in router.routes}
        assert {"/metrics", "/v1/models/x"} <= paths
        paths |= {"/docs", "/openapi.json", "/docs/oauth2-redirect", "/redoc"}
        # Nothing is reached by another spelling of an open path either.
        strange = {"/health/", "/health/../metrics", "/health%2f", "/assetsx", "/assets", "/ASSETS/x"}
        assert {"/", "/assets/x"} <= paths
        for path in (paths | strange | {"/nowhere"}) - {"/health"}:
            for headers in ({}, bearer(""), bearer("kex"), basic("kex"), {"Authorization": "key"}):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, path
                is_page = path == "/" or path.startswith("/assets/")
                assert answer.headers["www-authenticate"].startswith("Basic" if is_page else "Bearer")
        assert client.engine.requests == []


@pytest.mark.parametrize(
    ("credentials", "status"),
    [("anyone:key", 200), (":key", 200), ("key", 401), ("key:", 401), ("a:b:key", 401), ("anyone:kex", 401)],
)
def test_browsers_send_the_key_as_a_password(credentials, status):
    encoded = base64.b64encode(credentials.encode()).decode()
    with serving(api_key=("key",)) as client:
        for path in ("/", "/v1/models", "/metrics"):
            answer = client.get(path, headers={"Authorization": f"Basic {encoded}"})
            assert answer.status_code == status
        broken = client.get("/", headers={"Authorization": f"Basic !{encoded}"})
        assert broken.status_code == 401


def test_a_browsers_key_is_the_same_tenant():
    with serving(api_key=("key",)) as client:
        for headers in (bearer("key"), basic("key")):
            client.post(COMPLETIONS, json=BODY, headers=headers)
        first, second = client.engine.requests
        assert first.scheduling.tenant == second.scheduling.tenant != ""


def test_every_key_is_compared_whichever_is_given(monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def counting(left, right):
        compared.append((len(left), len(right)))
        return compare(left, right)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    keys = ("a", "bb" * 100, "ccc")
    with serving(api_key=keys) as client:
        for given in (*keys, "", "x", "a" * 5000):
            compared.clear()
            client.get("/version", headers=bearer(given))
            # One length for all: how much of a key is right, or how long it is, takes no time.
            assert compared == [(32, 32)] * 3


def test_a_key_is_a_tenant_and_not_to_be_read_from_it():
    with serving(api_key=("key-one", "key-two")) as client:
        for key, user in (("key-one", "a"), ("key-one", "b"), ("key-two", "a")):
            answer = client.post(COMPLETIONS, json={**BODY, "user": user}, headers=bearer(key))
            assert answer.status_code == 200
        one, same, two = [sent.scheduling.tenant for sent in client.engine.requests]
        assert one == same != two
        assert "key" not in one
    with serving() as client:
        client.post(COMPLETIONS, json={**BODY, "user": "a"})
        assert client.engine.requests[0].scheduling.tenant == "a"
