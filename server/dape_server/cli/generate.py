"""`dape generate`: a completion streamed to the terminal."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

from dape_engine.options import EngineOptions
from dape_engine.request import GenerationRequest, SamplingParams
from dape_server.cli.model import running_engine, split_model
from dape_server.cli.options import FiniteRange, config_option, settings_options
from dape_server.protocol.generation import SEEDS


@click.command()
@click.argument("model_and_prompt", nargs=-1, required=True, metavar="[MODEL] PROMPT|-")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=FiniteRange(0, 2), default=0.8, show_default=True, help="0: greedy.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: off.")
@click.option("--top-p", type=FiniteRange(0, 1, min_open=True), default=0.95, show_default=True)
@click.option("--min-p", type=FiniteRange(0, 1), default=0.0, show_default=True)
@click.option("--repetition-penalty", type=FiniteRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(-SEEDS, SEEDS - 1), help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="End the text before this string; may be given several times.")
@config_option
@settings_options(EngineOptions)
def generate(model_and_prompt: tuple[str, ...], **options: Any) -> None:
    """Continue PROMPT ("-" reads standard input) and stream the text to the terminal."""
    folder, rest = split_model(model_and_prompt)
    if len(rest) != 1:
        raise click.UsageError(f"expected [MODEL] PROMPT, got {len(rest)} prompts or an unknown model")
    if "" in options["stop"]:
        raise click.UsageError("--stop: the empty text would end every completion")
    prompt = sys.stdin.read() if rest[0] == "-" else rest[0]
    asyncio.run(_generate(folder, prompt, options))


async def _generate(folder: Path, prompt: str, options: dict[str, Any]) -> None:
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    sampling = SamplingParams(**{name: options[name] for name in names})
    async with running_engine(folder, options) as engine:
        tokens = engine.tokenizer.encode(prompt)
        async for output in engine.generate(GenerationRequest("generate", tuple(tokens), sampling)):
            sys.stdout.write(output.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
