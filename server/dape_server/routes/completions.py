"""POST /v1/completions, as one answer or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import orjson
from anyio import to_thread
from fastapi import APIRouter, Response

from dape_engine.errors import RequestError
from dape_engine.request import GenerationOutput, GenerationRequest
from dape_server.choices import ChoiceWriter, Echo, joined
from dape_server.context import Context, ServerContext
from dape_server.fanout import merge
from dape_server.json_body import JsonRoute
from dape_server.limits import MAX_LOGPROB_ENTRIES
from dape_server.protocol.common import Usage
from dape_server.protocol.completions import Choice, Completion, CompletionRequest
from dape_server.sse import EventStream
from dape_server.text import EncodedPrompt

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", response_model=None, responses={200: {"model": Completion}})
async def create_completion(body: CompletionRequest, context: ServerContext) -> Response:
    """Complete one prompt or many."""
    context.check_model(body.model)
    _check_vocabulary(body, context.engine.config.vocab_size)
    prompts = await context.texts.encode(
        body.prompt,
        "prompt",
        add_special_tokens=body.add_special_tokens,
        max_tokens=context.engine.max_model_len,
    )
    _check_entries(body, prompts, context.engine.max_model_len)
    context.metrics.on_completion_request(body.n)
    answer = CompletionAnswer(body, prompts, context)
    if body.stream:
        return await EventStream.open(answer.events())
    return Response(orjson.dumps(await answer.whole()), media_type="application/json")


class CompletionAnswer:
    """One request at work: its completions run side by side in the engine."""

    def __init__(self, body: CompletionRequest, prompts: list[EncodedPrompt], context: Context):
        self._body = body
        self._prompts = prompts
        self._context = context
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._completion_tokens = 0
        self._cached_tokens = 0

    async def whole(self) -> Completion:
        """Return the finished answer."""
        parts: list[list[Choice]] = [[] for _ in range(len(self._prompts) * self._body.n)]
        async with aclosing(self._choices()) as choices:
            async for choice in choices:
                parts[choice["index"]].append(choice)
        return {**self._chunk([joined(part) for part in parts]), "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of the stream as JSON."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        running_usage = options is not None and options.continuous_usage_stats
        async with aclosing(self._choices()) as choices:
            async for choice in choices:
                chunk = self._chunk([choice])
                if with_usage or running_usage:
                    chunk["usage"] = self._usage() if running_usage else None
                yield orjson.dumps(chunk)
        if with_usage:
            yield orjson.dumps({**self._chunk([]), "usage": self._usage()})

    async def _choices(self) -> AsyncGenerator[Choice, None]:
        """Yield what each completion gains, as it comes."""
        body, texts, tokenizer = self._body, self._context.texts, self._context.engine.tokenizer
        echoes = [await Echo.of(prompt, body, texts) for prompt in self._prompts]
        writers = [
            ChoiceWriter(prompt * body.n + i, self._prompts[prompt], echoes[prompt], body, tokenizer)
            for prompt in range(len(self._prompts))
            for i in range(body.n)
        ]
        async with aclosing(merge(self._outputs(index) for index in range(len(writers)))) as outputs:
            async for index, output in outputs:
                self._count(index, output)
                if output.prompt_logprobs is None:
                    yield writers[index].write(output)
                else:
                    # Names for every token of a long prompt take too long for the event loop.
                    yield await to_thread.run_sync(writers[index].write, output)

    async def _outputs(self, index: int) -> AsyncGenerator[GenerationOutput, None]:
        body = self._body
        prompt = self._prompts[index // body.n].token_ids
        if body.max_tokens == 0 and len(prompt) == 1:
            # Nothing is read or predicted, so there is no work for the engine.
            yield GenerationOutput("", (), prompt_logprobs=(None,), finish_reason="length")
            return
        request = GenerationRequest(
            f"{self._id}-{index}",
            prompt,
            body.sampling(index % body.n),
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        async with aclosing(self._context.engine.generate(request)) as outputs:
            async for output in outputs:
                yield output

    def _count(self, index: int, output: GenerationOutput) -> None:
        self._completion_tokens += len(output.token_ids)
        # As the prompt itself, what was cached of it counts once for all of its completions.
        if index % self._body.n == 0:
            self._cached_tokens += output.num_cached_tokens

    def _usage(self) -> Usage:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def _chunk(self, choices: list[Choice]) -> Completion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._context.model_name,
            "choices": choices,
        }


def _check_vocabulary(body: CompletionRequest, vocab_size: int) -> None:
    for field, tokens in (("stop_token_ids", body.stop_token_ids), ("logit_bias", body.logit_bias)):
        if (largest := max(tokens, default=0)) >= vocab_size:
            raise RequestError(
                f"{field}: token id must be from 0 to {vocab_size - 1}, got {largest}", param=field
            )


def _check_entries(body: CompletionRequest, prompts: Sequence[EncodedPrompt], longest: int) -> None:
    """Bound the size of the answer, where every token is reported with its alternatives."""
    if body.logprobs is None:
        return
    generated = min(body.max_tokens, longest) * len(prompts)
    echoed = sum(len(prompt.token_ids) for prompt in prompts) if body.echo else 0
    entries = (generated + echoed) * body.n * (1 + body.logprobs)
    if entries > MAX_LOGPROB_ENTRIES:
        raise RequestError(
            f"logprobs: {entries} values in the answer are above the limit of {MAX_LOGPROB_ENTRIES}; "
            "ask for fewer alternatives, prompts or tokens",
            param="logprobs",
        )
