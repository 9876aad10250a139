"""Grammars in the real engine: texts match beside any others, and end when they are complete."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from dape_engine.engine import AsyncEngine
from dape_engine.errors import RequestError
from dape_engine.grammar import Grammar, GrammarCompiler
from dape_engine.request import GenerationRequest, SamplingParams
from engines import GREEDY, drawn, engine_of, generate, tokens
from models import write_model

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["best", "worst"]}, "year": {"type": "integer", "maximum": 9999}},
    "required": ["name", "year"],
    "additionalProperties": False,
}
FOREVER = 'start: ("a"{1,10000}){1,10000}'
"""Outgrows the limits after some tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def compiled(engine: AsyncEngine, kind: str, source: object) -> Grammar:
    compiler = GrammarCompiler(engine.tokenizer, engine.config.vocab_size)
    return compiler.compile(kind, source, "structured_outputs")  # type: ignore[arg-type]


def text_of(outputs: list) -> str:
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
async def test_text_of_a_schema_is_json_and_ends_when_complete(folder: Path, temperature: float) -> None:
    async with engine_of(folder) as engine:
        grammar = compiled(engine, "json", SCHEMA)
        for seed in range(4):
            sampling = SamplingParams(max_tokens=100, temperature=temperature, seed=seed)
            outputs = await generate(engine, tokens(seed, 9), sampling, constraint=grammar.constraint())
            value = json.loads(text_of(outputs))
            assert value.keys() == {"name", "year"}
            assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)


async def test_neighbours_of_a_grammar_are_not_touched(folder: Path) -> None:
    async with engine_of(folder) as engine:
        alone = await generate(engine, tokens(1, 20))
        regex = compiled(engine, "regex", "(it|was){3,6}")
        requests = [
            GenerationRequest("plain", tokens(1, 20), GREEDY),
            *(
                GenerationRequest(
                    f"{seed}",
                    tokens(seed, 20),
                    SamplingParams(max_tokens=64, seed=seed),
                    constraint=regex.constraint(),
                )
                for seed in range(5)
            ),
        ]

        async def run(request: GenerationRequest) -> list:
            return [output async for output in engine.generate(request)]

        plain, *others = await asyncio.gather(*map(run, requests))
        assert drawn(plain) == drawn(alone)
        texts = [text_of(outputs) for outputs in others]
        assert all(re.fullmatch("(it|was){3,6}", text) for text in texts)
        assert len(set(texts)) > 1


async def test_stop_strings_and_the_token_limit_end_it_before_its_end(folder: Path) -> None:
    async with engine_of(folder) as engine:
        grammar = compiled(engine, "regex", "abcdef")
        stopped = await generate(
            engine,
            tokens(1, 5),
            SamplingParams(max_tokens=20, stop=("cd",)),
            constraint=grammar.constraint(),
        )
        assert (text_of(stopped), stopped[-1].stop_reason) == ("ab", "cd")
        cut = await generate(
            engine, tokens(1, 5), SamplingParams(max_tokens=2), constraint=grammar.constraint()
        )
        assert cut[-1].finish_reason == "length"
        assert "abcdef".startswith(text_of(cut))


async def test_grammar_that_outgrows_its_limits_ends_its_own_request_only(folder: Path) -> None:
    async with engine_of(folder) as engine:
        grammar = compiled(engine, "grammar", FOREVER)

        async def fail() -> None:
            sampling = SamplingParams(max_tokens=400, min_tokens=400)
            with pytest.raises(RequestError, match="structured_outputs: cannot be used"):
                await generate(engine, tokens(2, 5), sampling, constraint=grammar.constraint())

        alone = await generate(engine, tokens(1, 20))
        beside, _ = await asyncio.gather(generate(engine, tokens(1, 20)), fail())
        assert drawn(beside) == drawn(alone)
