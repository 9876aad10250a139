"""The requests of the load tests: their kinds, their lengths and their texts.

Texts are sentences of this project's own documentation in random order, so that no two prompts begin alike:
a prefix cache, which would flatter the server, finds nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dape_server.load.client import Request

REPOSITORY = Path(__file__).resolve().parents[2]
COMPLETIONS, PERPLEXITY = "/v1/completions", "/v1/perplexity"
# Mixtures of kinds by weight; the numbers of a mixture need not add up to anything.
STREAMING = {"stream": 1}
SCORING = {"score": 1}
CHAT = {"chat": 1}
MIX = {"chat": 70, "score": 20, "long": 10}
STEADY = {"chat": 80, "score": 20}
SPIKE = 10
"""Times as many users as usual."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths in tokens, of prompts and scored texts approximately: they are cut by words."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    """Of every generation; exactly, as the end of the text is ignored."""
    chat_tokens: int = 32
    """Prompt of a short chat."""
    score_tokens: int = 16384
    long_tokens: int = 16384
    """Prompt and completion of a long generation."""


def sentences() -> list[str]:
    """Return the sentences of the project's documentation, without tables and code."""
    found: list[str] = []
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        lines = [line for line in page.read_text().splitlines() if re.match(r"[A-Z]", line)]
        found += [part for part in re.split(r"(?<=[.:]) ", " ".join(lines)) if len(part) > 20]
    return found


class Workload:
    """Draws requests; the same seed draws the same ones.

    Args:
        model: its name, sent with every request.
        sizes: lengths.
        tokens_per_character: of the model's tokenizer on these texts.
        seed: of the random choices.
        score_route: `/v1/perplexity`, or `/v1/completions` for servers that score by `echo` only.
    """

    def __init__(
        self, model: str, sizes: Sizes, tokens_per_character: float, seed: int, score_route: str = PERPLEXITY
    ):
        self._model = model
        self._sizes = sizes
        self._density = tokens_per_character
        self._random = random.Random(seed)
        self._score_route = score_route
        self._sentences = sentences()

    def draw(self, kinds: Mapping[str, int]) -> Request:
        """Return the next request of a mixture of kinds."""
        [kind] = self._random.choices(list(kinds), list(kinds.values()))
        return self.request(kind)

    def endless(self, kinds: Mapping[str, int]) -> Iterator[Request]:
        """Yield requests of a mixture without end."""
        while True:
            yield self.draw(kinds)

    def request(self, kind: str) -> Request:
        """Return a request of one kind: stream, chat, long or score."""
        sizes = self._sizes
        if kind == "score":
            return self._score()
        room = max(1, sizes.long_tokens - sizes.output_tokens)
        length = {"stream": sizes.prompt_tokens, "chat": sizes.chat_tokens, "long": room}[kind]
        body = {
            "model": self._model,
            "prompt": self.text(length),
            "max_tokens": sizes.output_tokens,
            "ignore_eos": True,
            "temperature": 0.8,
            "seed": self._random.getrandbits(31),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Request(kind, COMPLETIONS, body)

    def text(self, tokens: int) -> str:
        """Return a text of about so many tokens, unlike any other from its first words on."""
        wanted = max(1, round(tokens / self._density))
        parts = [f"{self._random.getrandbits(48):012x}"]
        length = len(parts[0])
        while length < wanted:
            parts.append(self._random.choice(self._sentences))
            length += 1 + len(parts[-1])
        return " ".join(parts)[:wanted]

    def _score(self) -> Request:
        text = self.text(self._sizes.score_tokens)
        if self._score_route == PERPLEXITY:
            return Request("score", PERPLEXITY, {"model": self._model, "input": text})
        body = {"model": self._model, "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1}
        return Request("score", COMPLETIONS, body)
