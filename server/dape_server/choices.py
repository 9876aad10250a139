"""The engine's outputs as OpenAI's choices: text, log-probabilities, token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from dape_engine.request import GenerationOutput, TokenLogprob
from dape_engine.tokenizer import TextTokenizer
from dape_server.protocol.completions import Choice, CompletionRequest, Logprobs
from dape_server.text import EncodedPrompt, TextService


@dataclass(frozen=True, slots=True)
class Echo:
    """What `echo` puts before every completion of a prompt."""

    text: str = ""
    offsets: list[int] = field(default_factory=list)
    """Where each prompt token begins in the text; empty without log-probabilities."""

    @classmethod
    async def of(cls, prompt: EncodedPrompt, body: CompletionRequest, texts: TextService) -> Echo:
        """Return the echo of one prompt, empty where none is wanted."""
        if not body.echo:
            return cls()
        text = prompt.text if prompt.text is not None else await texts.decode(list(prompt.token_ids))
        return cls(text, [] if body.logprobs is None else await texts.offsets(prompt.token_ids, text))


class ChoiceWriter:
    """Writes what one completion gains, output by output."""

    def __init__(
        self, index: int, prompt: EncodedPrompt, echo: Echo, body: CompletionRequest, tokenizer: TextTokenizer
    ):
        self._index = index
        self._prompt = prompt
        self._echo = echo
        self._body = body
        self._tokenizer = tokenizer
        self._begun = False

    def write(self, output: GenerationOutput) -> Choice:
        """Return one output as a choice; the first one carries the echo."""
        first, self._begun = not self._begun, True
        choice: Choice = {
            "index": self._index,
            "text": self._echo.text + output.text if first else output.text,
            "logprobs": self._logprobs(output) if self._body.logprobs is not None else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(output.token_ids)
            if first:
                choice["prompt_token_ids"] = list(self._prompt.token_ids)
        return choice

    def _logprobs(self, output: GenerationOutput) -> Logprobs:
        entries: list[TokenLogprob | None] = []
        offsets: list[int] = []
        if output.prompt_logprobs is not None:
            entries += output.prompt_logprobs
            offsets += self._echo.offsets
        entries += output.logprobs
        offsets += [len(self._echo.text) + offset for offset in output.text_offsets]
        # Only a prompt's first token has no entry.
        first = self._prompt.token_ids[0]
        return {
            "tokens": [self._token(entry.token_id if entry else first) for entry in entries],
            "token_logprobs": [entry.logprob if entry else None for entry in entries],
            "top_logprobs": [alternatives(entry, self._token) if entry else None for entry in entries],
            "text_offset": offsets,
        }

    def _token(self, token_id: int) -> str:
        if self._body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)


def alternatives(entry: TokenLogprob, name: Callable[[int], str]) -> dict[str, float]:
    """Return the likeliest tokens and the token itself; of two with the same name the likelier counts."""
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        text = name(token)
        top[text] = max(logprob, top.get(text, logprob))
    return top


def joined(parts: Sequence[Choice]) -> Choice:
    """Return all parts of one completion as one choice."""
    first, last = parts[0], parts[-1]
    choice: Choice = {**last, "text": "".join(part["text"] for part in parts)}
    if first["logprobs"] is not None:
        choice["logprobs"] = _joined_logprobs(part["logprobs"] for part in parts)
    if "token_ids" in first:
        choice["token_ids"] = [token for part in parts for token in part["token_ids"]]
        choice["prompt_token_ids"] = first["prompt_token_ids"]
    return choice


def _joined_logprobs(parts: Iterable[Logprobs | None]) -> Logprobs:
    whole: Logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        if part is not None:
            whole["tokens"] += part["tokens"]
            whole["token_logprobs"] += part["token_logprobs"]
            whole["top_logprobs"] += part["top_logprobs"]
            whole["text_offset"] += part["text_offset"]
    return whole
