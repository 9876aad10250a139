"""A request for texts at work: its completions run side by side in the engine, told whole or as a stream.

What completions and chats have in common; how a choice looks is told by the subclasses.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import orjson
from anyio import to_thread
from fastapi import Request, Response

from dape_engine.errors import ContextLengthError, RequestError
from dape_engine.grammar import Grammar
from dape_engine.request import GenerationOutput, GenerationRequest, Scheduling
from dape_server.context import Context
from dape_server.fanout import merge
from dape_server.limits import MAX_LOGPROB_ENTRIES
from dape_server.protocol.common import Usage
from dape_server.protocol.generation import GenerationBody, PromptProgressReport
from dape_server.scheduling import answer_id, engine_id
from dape_server.sse import EventStream
from dape_server.text import EncodedPrompt


class ChoiceWriter(Protocol):
    """Writes what one completion gains, output by output, or the whole of it."""

    def pieces(self, output: GenerationOutput) -> Sequence[Mapping[str, Any]]:
        """Return what one output adds to a stream."""

    def whole(self, output: GenerationOutput) -> Mapping[str, Any]:
        """Return the finished choice."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the engine is asked for, checked and bounded."""

    name: str
    """Id of the answer."""
    prompts: list[EncodedPrompt]
    max_tokens: list[int]
    """Per prompt."""
    bad_words: tuple[tuple[int, ...], ...]
    grammar: Grammar | None
    scheduling: Scheduling
    prompt_logprobs: int | None
    """Alternatives per token of the prompt; None: nothing is scored."""


async def make_plan(
    kind: str,
    body: GenerationBody,
    prompts: list[EncodedPrompt],
    echoed: int | None,
    place: Scheduling,
    request: Request,
    context: Context,
) -> Plan:
    """Check what a request costs before any of its work begins.

    Args:
        kind: what the answer is, as in its id.
        body: the request.
        prompts: its prompts as token ids.
        echoed: alternatives reported with an echo of the prompt, None without.
        place: among other requests.
        request: gives the name.
        context: the server's parts.

    Raises:
        RequestError: the request costs more tokens or values than allowed, or its grammar cannot be used.
        ContextLengthError: a prompt leaves no room for its completion.
    """
    longest = context.engine.max_model_len
    _check_vocabulary(body, context.engine.config.vocab_size)
    prompts = _truncated(body, prompts, longest)
    max_tokens = [_tokens_wanted(body, prompt, longest) for prompt in prompts]
    scored = max((top for top in (echoed, body.prompt_logprobs) if top is not None), default=None)
    _check_entries(body, prompts, max_tokens, scored, longest)
    _check_cost(body, prompts, max_tokens, context)
    source = body.grammar_source()
    grammar = None
    if source is not None:
        grammar = await to_thread.run_sync(
            context.grammars.compile, source.kind, source.source, source.field, limiter=context.compiling
        )
    return Plan(
        name=answer_id(kind, body, request),
        prompts=prompts,
        max_tokens=max_tokens,
        bad_words=context.texts.word_ids(body.bad_words),
        grammar=grammar,
        scheduling=place,
        prompt_logprobs=scored,
    )


class Answer(ABC):
    """One request at work."""

    whole_object: ClassVar[str]
    """The `object` of an answer."""
    chunk_object: ClassVar[str]
    """The `object` of a chunk of its stream."""

    def __init__(self, body: GenerationBody, plan: Plan, context: Context):
        self._body = body
        self._plan = plan
        self._context = context
        self._created = int(time.time())
        self._completion_tokens = 0
        self._cached_tokens = 0

    @abstractmethod
    async def writers(self) -> Sequence[ChoiceWriter]:
        """Return one writer per completion: `n` for the first prompt, `n` for the second, and so on."""

    async def respond(self) -> Response:
        """Return the HTTP answer, finished or as a stream that has begun."""
        self._context.metrics.on_completion_request(self._body.n)
        if self._body.stream:
            return await EventStream.open(self.events(), self._context.settings.sse_ping_interval)
        return Response(orjson.dumps(await self.whole()), media_type="application/json")

    async def whole(self) -> dict[str, Any]:
        """Return the finished answer."""
        writers = await self.writers()
        parts: list[list[GenerationOutput]] = [[] for _ in writers]
        async with aclosing(self._outputs()) as outputs:
            async for index, output in outputs:
                parts[index].append(output)
        choices = [
            await to_thread.run_sync(writer.whole, joined(part))
            if self._body.num_logprobs is not None or self._plan.prompt_logprobs is not None
            else writer.whole(joined(part))
            for writer, part in zip(writers, parts, strict=True)
        ]
        return {**self._frame(self.whole_object, choices), "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of the stream as JSON."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        running_usage = options is not None and options.continuous_usage_stats
        writers = await self.writers()
        async with aclosing(self._outputs()) as outputs:
            async for index, output in outputs:
                if output.prompt_logprobs is None:
                    chunks = self._chunks(index, writers[index], output)
                else:
                    # Names for every token of a long text take too long for the event loop.
                    chunks = await to_thread.run_sync(self._chunks, index, writers[index], output)
                for chunk in chunks:
                    if with_usage or running_usage:
                        chunk["usage"] = self._usage() if running_usage else None
                    yield orjson.dumps(chunk)
        if with_usage:
            yield orjson.dumps({**self._frame(self.chunk_object, []), "usage": self._usage()})

    def _chunks(self, index: int, writer: ChoiceWriter, output: GenerationOutput) -> list[dict[str, Any]]:
        if output.progress is not None:
            progress: PromptProgressReport = {
                "index": index,
                "total": output.progress.total,
                "cache": output.progress.cached,
                "processed": output.progress.processed,
                "time_ms": round(output.progress.seconds * 1000),
            }
            return [{**self._frame(self.chunk_object, []), "prompt_progress": progress}]
        return [self._frame(self.chunk_object, [choice]) for choice in writer.pieces(output)]

    async def _outputs(self) -> AsyncGenerator[tuple[int, GenerationOutput], None]:
        """Yield what each completion gains, as it comes."""
        name = engine_id(self._plan.name)
        count = len(self._plan.prompts) * self._body.n
        sources = (self._generate(name, index) for index in range(count))
        if (interval := self._body.stream_interval) > 1:
            sources = (_spaced(source, interval) for source in sources)
        async with aclosing(merge(sources)) as outputs:
            async for index, output in outputs:
                self._completion_tokens += len(output.token_ids)
                # As the prompt itself, what was cached of it counts once for all of its completions.
                if index % self._body.n == 0:
                    self._cached_tokens += output.num_cached_tokens
                yield index, output

    async def _generate(self, name: str, index: int) -> AsyncGenerator[GenerationOutput, None]:
        plan, body = self._plan, self._body
        prompt, max_tokens = plan.prompts[index // body.n].token_ids, plan.max_tokens[index // body.n]
        if max_tokens == 0 and len(prompt) == 1:
            # Nothing is read or predicted, so there is no work for the engine.
            yield GenerationOutput("", (), prompt_logprobs=(None,), finish_reason="length")
            return
        request = GenerationRequest(
            f"{name}-{index}",
            prompt,
            body.sampling(index % body.n, max_tokens, plan.bad_words),
            prompt_logprobs=plan.prompt_logprobs,
            scheduling=plan.scheduling,
            constraint=None if plan.grammar is None else plan.grammar.constraint(),
            speculation=body.speculative_config,
            report_progress=body.return_progress,
        )
        async with aclosing(self._context.engine.generate(request)) as outputs:
            async for output in outputs:
                yield output

    def _usage(self) -> Usage:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self._plan.prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def _frame(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._plan.name,
            "object": kind,
            "created": self._created,
            "model": self._context.model_name,
            "system_fingerprint": self._context.fingerprint,
            "choices": choices,
        }


def joined(parts: Sequence[GenerationOutput]) -> GenerationOutput:
    """Return consecutive outputs of one completion as one."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        text_offsets=tuple(offset for part in parts for offset in part.text_offsets),
        prompt_logprobs=parts[0].prompt_logprobs,
        num_cached_tokens=sum(part.num_cached_tokens for part in parts),
    )


async def _spaced(
    outputs: AsyncGenerator[GenerationOutput, None], interval: int
) -> AsyncGenerator[GenerationOutput, None]:
    """Yield the first token at once, then outputs of `interval` tokens each, the last of the rest."""
    held: list[GenerationOutput] = []
    begun = False
    async with aclosing(outputs):
        async for output in outputs:
            held.append(output)
            tokens = sum(len(part.token_ids) for part in held)
            if begun and tokens < interval and output.finish_reason is None:
                continue
            begun = begun or tokens > 0
            yield joined(held)
            held.clear()


def _truncated(body: GenerationBody, prompts: list[EncodedPrompt], longest: int) -> list[EncodedPrompt]:
    """Return the prompts as `truncate_prompt_tokens` asks."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return prompts
    if limit == -1:
        limit = max(longest - (body.tokens_wanted or 1), 1)
    part = slice(-limit, None) if body.truncation_side == "left" else slice(limit)
    return [
        prompt if len(prompt.token_ids) <= limit else EncodedPrompt(prompt.token_ids[part], None)
        for prompt in prompts
    ]


def _tokens_wanted(body: GenerationBody, prompt: EncodedPrompt, longest: int) -> int:
    if body.tokens_wanted is not None:
        return body.tokens_wanted
    if (room := longest - len(prompt.token_ids)) < 1:
        raise ContextLengthError(
            f"messages: {len(prompt.token_ids)} tokens leave no room for an answer within the limit "
            f"of {longest}",
            param="messages",
        )
    return room


def _check_vocabulary(body: GenerationBody, vocab_size: int) -> None:
    for field, tokens in (
        ("stop_token_ids", body.stop_token_ids),
        ("logit_bias", body.logit_bias),
        ("allowed_token_ids", body.allowed_token_ids),
        ("logprob_token_ids", body.logprob_token_ids),
    ):
        if (largest := max(tokens, default=0)) >= vocab_size:
            raise RequestError(
                f"{field}: token id must be from 0 to {vocab_size - 1}, got {largest}", param=field
            )


def _check_cost(
    body: GenerationBody, prompts: Sequence[EncodedPrompt], max_tokens: Sequence[int], context: Context
) -> None:
    """Bound the tokens of all completions; one that is too long by itself is left to the engine."""
    limit, longest = context.settings.max_request_tokens, context.engine.max_model_len
    read = sum(len(prompt.token_ids) for prompt in prompts)
    generated = sum(min(count, longest) for count in max_tokens)
    if (total := body.n * (read + generated)) > limit:
        raise RequestError(
            f"max_tokens: n {body.n} x ({read} prompt tokens + {generated} tokens to generate) = {total} "
            f"tokens are above the limit of {limit}",
            param="max_tokens",
            code="request_too_large",
        )


def _check_entries(
    body: GenerationBody,
    prompts: Sequence[EncodedPrompt],
    max_tokens: Sequence[int],
    scored: int | None,
    longest: int,
) -> None:
    """Bound the size of the answer, where every token is reported with its alternatives."""
    values = 0
    if body.num_logprobs is not None:
        each = 1 + body.num_logprobs + len(body.logprob_token_ids)
        values += sum(min(count, longest) for count in max_tokens) * each
    if scored is not None:
        values += sum(len(prompt.token_ids) for prompt in prompts) * (1 + scored)
    if (entries := values * body.n) > MAX_LOGPROB_ENTRIES:
        field = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        raise RequestError(
            f"{field}: {entries} values in the answer are above the limit of {MAX_LOGPROB_ENTRIES}; "
            "ask for fewer alternatives, prompts or tokens",
            param=field,
        )
