"""An engine without a model, for tests of what surrounds the engine.

It keeps the interface, the refusals and the bookkeeping of `dape_engine.engine.AsyncEngine`, is exact to
the last digit, and can be held between two tokens so that tests need no sleeping.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dape_engine.config import ModelConfig, PositionConfig
from dape_engine.detokenizer import OutputText
from dape_engine.errors import ContextLengthError, EngineStoppedError, QueueFullError, RequestError
from dape_engine.inspection import Inspection, InspectionRequest, LayerBias, check_inspection, thinned
from dape_engine.request import (
    TIMED_OUT,
    EngineState,
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    PromptProgress,
    SamplingParams,
    ScoreRequest,
    TokenLogprob,
    WindowScores,
)
from dape_engine.tokenizer import TextTokenizer
from dape_server.app import create_app
from dape_server.metrics import Metrics
from dape_server.settings import ServerSettings

EOS, BOS = 0, 1
SPECIAL = ("<|endoftext|>", "<s>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "n"), ("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"))
BLOCK_SIZE = 4

COMPLETIONS, PERPLEXITY = "/v1/completions", "/v1/perplexity"
JSON = {"content-type": "application/json"}
IDS = [259, 264, 70, 71, 259, 80, 81, 264, 90, 91, 259]
"""A text to score."""
CANARY = "swordfish"
"""Text of prompts that no error may repeat."""


def byte_tokenizer(*, adds_bos: bool = False) -> Tokenizer:
    """Return a byte-level tokenizer with a handful of merges; emoji take four tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *letters, *("".join(pair) for pair in MERGES)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return tokenizer


def logprob(previous: int, token: int, context: int) -> float:
    """Return the log-probability of a token after `context` tokens, the last of which is `previous`."""
    return -0.5 - (previous * 31 + token * 17) % 97 / 16 - 1 / (1 + context)


class FakeEngine:
    """Generates a script, token by token; its log-probabilities are those of `logprob`."""

    def __init__(
        self,
        *,
        adds_bos: bool = False,
        max_model_len: int = 64,
        num_blocks: int = 256,
        max_num_queued_reqs: int = 200,
        script: str = "on the cat",
        ends: bool = False,
        chat_template: str | None = None,
    ):
        tokenizer = byte_tokenizer(adds_bos=adds_bos)
        self.config = ModelConfig(
            vocab_size=tokenizer.get_vocab_size() + 3,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=4,
            train_length=16,
            max_model_len=max_model_len,
            bos_token_id=BOS,
            eos_token_id=EOS,
            position=PositionConfig(kind="kerple"),
        )
        self.tokenizer = TextTokenizer(tokenizer, self.config, chat_template)
        self.model_name = "fake"
        self.max_model_len = max_model_len
        self.script = [*self.tokenizer.encode(script, add_special_tokens=False), *([EOS] if ends else [])]
        self.num_blocks = num_blocks
        self.block_size = BLOCK_SIZE
        self.backend_name = "fake"
        self.dtype_name = "float32"
        self.limit = max_num_queued_reqs
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails_with: Exception | None = None
        self.failure: str | None = None
        self.seconds_since_progress = 0.0
        self.requests: list[GenerationRequest | ScoreRequest | InspectionRequest] = []
        self.active: dict[str, int] = {}
        self.aborted: list[str] = []
        self.steps = 0
        self.started = self.stopped = False

    @property
    def free_blocks(self) -> int:
        """Blocks that no request holds."""
        return self.num_blocks - sum(self.active.values())

    def start(self) -> None:
        self.started = True

    async def shutdown(self, _drain_seconds: float) -> None:
        """Abort everything at once, however long the drain might have been."""
        self.stopped = True
        self.gate.set()

    def state(self) -> EngineState:
        return EngineState(
            running=len(self.active),
            waiting=0,
            waiting_tokens=0,
            free_blocks=self.free_blocks,
            total_blocks=self.num_blocks,
            cached_blocks=0,
            steps=self.steps,
            seconds_since_progress=self.seconds_since_progress,
            stopped=self.stopped or not self.started,
            failure=self.failure,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        sampling, prompt = request.sampling, request.prompt
        self._check(prompt)
        if (total := len(prompt) + sampling.max_tokens) > self.max_model_len:
            raise ContextLengthError(
                f"prompt ({len(prompt)} tokens) plus max_tokens ({sampling.max_tokens}) is {total} tokens, "
                f"above the limit of {self.max_model_len}",
                param="max_tokens",
            )
        with self._admitted(request, total):
            echoed = self._prompt_logprobs(request)
            text = OutputText(self.tokenizer, sampling)
            tokens = list(prompt)
            constraint, deadline = request.constraint, request.scheduling.deadline
            for processed in (len(prompt) // 2, len(prompt)) if request.report_progress else ():
                yield GenerationOutput("", (), progress=PromptProgress(len(prompt), 1, processed, 0.25))
            if sampling.max_tokens == 0:
                await self._step()
                yield GenerationOutput("", (), prompt_logprobs=echoed, finish_reason="length")
            for count in range(1, sampling.max_tokens + 1):
                await self._step()
                if deadline is not None and time.monotonic() > deadline:
                    yield GenerationOutput(text.flush(), (), finish_reason="length", stop_reason=TIMED_OUT)
                    return
                token = self._allowed(self._draw(sampling, count - 1), request)
                if constraint is not None:
                    constraint.append(token)
                    if constraint.error is not None:
                        raise constraint.error
                delta = text.push(token)
                finish: FinishReason | None = delta.finish_reason
                tail = ""
                if finish is None and constraint is not None and constraint.is_complete:
                    finish, tail = "stop", text.flush()
                if finish is None and count == sampling.max_tokens:
                    finish, tail = "length", text.flush()
                entry = self._entry(tokens, token, sampling.logprobs or 0, sampling.logprob_token_ids)
                tokens.append(token)
                yield GenerationOutput(
                    text=delta.text + tail,
                    token_ids=(token,),
                    logprobs=() if sampling.logprobs is None else (entry,),
                    text_offsets=(delta.offset,),
                    prompt_logprobs=echoed if count == 1 else None,
                    num_cached_tokens=1 if count == 1 else 0,
                    finish_reason=finish,
                    stop_reason=delta.stop_reason,
                )
                if finish is not None:
                    return

    async def score(self, request: ScoreRequest) -> AsyncGenerator[WindowScores, None]:
        self._check(request.token_ids)
        with self._admitted(request, len(request.token_ids)):
            for window in request.windows:
                if window.end - window.start > self.max_model_len:
                    raise ContextLengthError("a window is too long", param="context_length")
                await self._step()
                tokens = request.token_ids[window.start : window.end]
                first = window.score_from - window.start
                entries = [
                    self._entry(tokens[:place], tokens[place], request.top_logprobs)
                    for place in range(first, len(tokens))
                ]
                top = tuple(entry.top for entry in entries) if request.top_logprobs else ()
                logprobs = tuple(entry.logprob for entry in entries)
                yield WindowScores(window, logprobs, top, num_cached_tokens=window.start)

    async def inspect(self, request: InspectionRequest) -> Inspection:
        self._check(request.token_ids)
        check_inspection(request, self.config.num_hidden_layers, self.config.num_attention_heads)
        with self._admitted(request, request.query + 1):
            await self._step()
            keys = thinned(request.query + 1, request.max_keys)
            distance = request.query - np.array([keys] * len(request.heads), dtype=np.float32)
            bias = LayerBias(0, np.cos(distance), -distance, np.sin(distance) - distance)
            return Inspection(tuple(replace(bias, layer=layer) for layer in request.layers), keys, 0)

    def _check(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise RequestError("the input is empty; at least 1 token is needed", param="prompt")
        if not all(0 <= token < self.config.vocab_size for token in token_ids):
            raise RequestError("unknown token id", param="prompt")

    @contextmanager
    def _admitted(
        self, request: GenerationRequest | ScoreRequest | InspectionRequest, tokens: int
    ) -> Iterator[None]:
        if self.stopped:
            raise EngineStoppedError("the engine has stopped")
        if len(self.active) >= self.limit:
            raise QueueFullError(f"{len(self.active)} requests wait already", retry_after=7)
        if request.request_id in self.active:
            raise AssertionError("request ids must be unique")
        self.requests.append(request)
        self.active[request.request_id] = math.ceil(tokens / BLOCK_SIZE)
        try:
            yield
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request.request_id)
            raise
        finally:
            del self.active[request.request_id]

    async def _step(self) -> None:
        await asyncio.sleep(0)
        await self.gate.wait()
        self.steps += 1
        if self.fails_with is not None:
            raise self.fails_with
        if self.stopped:
            raise EngineStoppedError("the engine has stopped before the request was finished")

    def _draw(self, sampling: SamplingParams, place: int) -> int:
        shift = (sampling.seed or 0) if sampling.temperature > 0 else 0
        return self.script[(place + shift) % len(self.script)]

    def _allowed(self, token: int, request: GenerationRequest) -> int:
        """Return the token, or the first one that may stand in its place."""
        if request.constraint is None and not request.sampling.allowed_token_ids:
            return token
        wishes = torch.zeros(self.config.vocab_size)
        wishes[token] = 1
        if request.constraint is not None:
            request.constraint.restrict(wishes)
        if request.sampling.allowed_token_ids:
            wishes[list(request.sampling.allowed_token_ids)] += 2
        return int(wishes.argmax())

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[TokenLogprob | None, ...] | None:
        if request.prompt_logprobs is None:
            return None
        prompt = request.prompt
        return None, *(
            self._entry(prompt[:place], prompt[place], request.prompt_logprobs)
            for place in range(1, len(prompt))
        )

    def _entry(
        self,
        before: tuple[int, ...] | list[int],
        token: int,
        top: int,
        others: tuple[int, ...] = (),
    ) -> TokenLogprob:
        values = [logprob(before[-1], other, len(before)) for other in range(self.config.vocab_size)]
        likeliest = sorted(range(len(values)), key=lambda other: (-values[other], other))[:top]
        shown = dict.fromkeys((*likeliest, *others))
        rank = 1 + sum(value > values[token] for value in values)
        return TokenLogprob(token, values[token], tuple((other, values[other]) for other in shown), rank)


@contextmanager
def serving(
    engine: FakeEngine | None = None, metrics: Metrics | None = None, **settings: object
) -> Iterator[TestClient]:
    """Run the application over an engine and give its client; the engine is `client.engine`."""
    engine = engine or FakeEngine()
    app = create_app(engine, ServerSettings(**settings), metrics)
    with TestClient(app, raise_server_exceptions=False) as client:
        client.engine = engine
        yield client


def events(text: str) -> list[dict]:
    """Return the JSON values of an event stream, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def check_refused(client, path, body, param=None, *, status=400, code=None, says=""):
    """Post a body, JSON text or an object; check the refusal and that nothing is left of it."""
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    free = client.engine.free_blocks
    answer = client.post(path, content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert code is None or error["code"] == code
    assert says in error["message"]
    assert CANARY not in answer.text
    assert not re.search(r"0x[0-9a-f]{6,}", answer.text)
    assert len(answer.text) < 1000
    assert client.engine.free_blocks == free
    assert client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": 1}).status_code == 200


def score(client: TestClient, **body: object) -> Any:
    """Return the answer about the perplexity of `IDS`; a bare NaN in it is an error."""
    answer = client.post(PERPLEXITY, json={"input": IDS, **body})
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
