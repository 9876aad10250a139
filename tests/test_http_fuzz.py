"""Whatever a JSON body holds, the answer is a success or a refusal in OpenAI's form, and nothing is kept."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dape_server.protocol.chat import ChatRequest
from dape_server.protocol.completions import CompletionRequest
from dape_server.protocol.perplexity import PerplexityRequest
from dape_server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from fakes import JSON, FakeEngine, serving

BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/perplexity": PerplexityRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["the cat", "sliding", "half", "last", "suffix", "always"])
)
VALUES = SCALARS | st.lists(SCALARS | st.lists(SCALARS, max_size=3), max_size=4)
VALUES |= st.dictionaries(st.text("0123456789", max_size=3), SCALARS, max_size=3)
INPUTS = st.sampled_from(
    ["the cat on the cat", [259, 264, 70, 71], ["the cat", "on on"], [[5, 6, 7], [8, 9]]]
)
MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def client():
    with serving(FakeEngine(max_model_len=32, chat_template="{{ messages[0].content }}")) as client:
        yield client


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_body_is_served_or_refused(client, path, data):
    names = st.sampled_from(sorted(BODIES[path].model_fields))
    body = data.draw(st.dictionaries(names, VALUES, max_size=3))
    for required in ("prompt", "input"):
        if required in BODIES[path].model_fields:
            body.setdefault(required, data.draw(INPUTS))
    if "messages" in BODIES[path].model_fields and path != "/tokenize":
        body.setdefault("messages", MESSAGES)
    answer = client.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["param"] is None or error["param"].split(".")[0] in BODIES[path].model_fields
    assert client.engine.free_blocks == client.engine.num_blocks
