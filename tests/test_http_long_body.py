"""Long bodies are parsed beside the event loop, after a count of what they hold."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dape_server.json_body
from dape_server.json_body import LONG_BODY, count_values
from dape_server.limits import MAX_JSON_LISTS, MAX_JSON_VALUES
from fakes import COMPLETIONS, check_refused, serving

values = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a[]{},:"\\\n/é')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('[{,"\\')), inner),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def client():
    with serving() as client:
        yield client


def counted(value):
    """Return lists and objects, and values."""
    if not isinstance(value, (list, dict)):
        return 0, 1
    inner = [counted(item) for item in (value.values() if isinstance(value, dict) else value)]
    return 1 + sum(lists for lists, _ in inner), 1 + sum(values for _, values in inner)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(value=values, ascii=st.booleans())
def test_values_are_counted_outside_of_strings(value, ascii):
    lists, bound = count_values(json.dumps(value, ensure_ascii=ascii).encode())
    expected_lists, expected_values = counted(value)
    assert lists == expected_lists
    # An empty list or object is taken for one with a value.
    assert expected_values <= bound <= expected_values + lists


def test_too_many_lists_are_refused(client):
    body = '{"prompt": [' + "[5]," * MAX_JSON_LISTS + "[5]]}"
    check_refused(client, COMPLETIONS, body, code="invalid_json", says=f"limit of {MAX_JSON_LISTS}")


def test_too_many_values_are_refused(client):
    body = '{"prompt": [' + "5," * MAX_JSON_VALUES + "5]}"
    check_refused(client, COMPLETIONS, body, code="invalid_json", says=f"limit of {MAX_JSON_VALUES}")


def test_signs_in_a_text_do_not_count(client):
    text = '[{"\\,' * 20_000
    body = {"prompt": text, "add_special_tokens": False}
    answer = client.post("/tokenize", json=body)
    assert answer.status_code == 200
    assert client.post("/detokenize", json={"tokens": answer.json()["tokens"]}).json() == {"prompt": text}


@pytest.mark.parametrize("size", [LONG_BODY, LONG_BODY + 1])
def test_only_long_bodies_leave_the_loop(client, monkeypatch, size):
    threads = []
    parse = dape_server.json_body._parse

    def noted(body):
        threads.append(threading.current_thread().name)
        return parse(body)

    monkeypatch.setattr(dape_server.json_body, "_parse", noted)
    client.post(
        "/tokenize", content=b'{"prompt": "the"}'.ljust(size), headers={"content-type": "application/json"}
    )
    (thread,) = threads
    assert ("AnyIO worker" in thread) == (size > LONG_BODY)
