"""The engine's outputs as the choices of a completion: text, log-probabilities, token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dape_engine.request import GenerationOutput, TokenLogprob
from dape_engine.tokenizer import TextTokenizer
from dape_server.protocol.completions import Choice, CompletionRequest, Logprobs
from dape_server.protocol.generation import GenerationBody, PromptLogprob, PromptLogprobs
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


class CompletionWriter:
    """Writes what one completion gains, output by output."""

    def __init__(
        self, index: int, prompt: EncodedPrompt, echo: Echo, body: CompletionRequest, tokenizer: TextTokenizer
    ):
        self._index = index
        self._prompt = prompt
        self._echo = echo
        self._body = body
        self._name = token_name(body, tokenizer)
        self._tokenizer = tokenizer
        self._begun = False

    def pieces(self, output: GenerationOutput) -> Sequence[Choice]:
        """Return what one output adds to a stream."""
        return [self.whole(output)]

    def whole(self, output: GenerationOutput) -> Choice:
        """Return one output as a choice; the first one carries the echo."""
        first, self._begun = not self._begun, True
        choice: Choice = {
            "index": self._index,
            "text": self._echo.text + output.text if first else output.text,
            "logprobs": self._logprobs(output) if self._body.num_logprobs is not None else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(output.token_ids)
            if first:
                choice["prompt_token_ids"] = list(self._prompt.token_ids)
        if (top := self._body.prompt_logprobs) is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output, top, self._tokenizer)
        return choice

    def _logprobs(self, output: GenerationOutput) -> Logprobs:
        entries: list[TokenLogprob | None] = []
        offsets: list[int] = []
        if self._body.echo and output.prompt_logprobs is not None:
            top = self._body.logprobs or 0
            entries += [entry and _narrow(entry, top) for entry in output.prompt_logprobs]
            offsets += self._echo.offsets
        entries += output.logprobs
        offsets += [len(self._echo.text) + offset for offset in output.text_offsets]
        # Only a prompt's first token has no entry.
        first = self._prompt.token_ids[0]
        return {
            "tokens": [self._name(entry.token_id if entry else first) for entry in entries],
            "token_logprobs": [entry.logprob if entry else None for entry in entries],
            "top_logprobs": [alternatives(entry, self._name) if entry else None for entry in entries],
            "text_offset": offsets,
        }


def token_name(body: GenerationBody, tokenizer: TextTokenizer) -> Callable[[int], str]:
    """Return how the request wants tokens to be written."""
    return (lambda token: f"token_id:{token}") if body.return_tokens_as_token_ids else tokenizer.token_text


def alternatives(entry: TokenLogprob, name: Callable[[int], str]) -> dict[str, float]:
    """Return the likeliest tokens and the token itself; of two with the same name the likelier counts."""
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        text = name(token)
        top[text] = max(logprob, top.get(text, logprob))
    return top


def prompt_logprobs(output: GenerationOutput, top: int, tokenizer: TextTokenizer) -> PromptLogprobs:
    """Return vLLM's `prompt_logprobs`: what the model thought at each token of the prompt.

    Args:
        output: the first of a completion.
        top: alternatives wanted.
        tokenizer: gives the tokens' texts.
    """
    return [
        None if entry is None else _by_token(_narrow(entry, top), tokenizer)
        for entry in output.prompt_logprobs or ()
    ]


def _by_token(entry: TokenLogprob, tokenizer: TextTokenizer) -> dict[str, PromptLogprob]:
    """Return one place's tokens by id."""
    found: dict[str, PromptLogprob] = {}
    ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)]
    for token, logprob, rank in (*ranked, (entry.token_id, entry.logprob, entry.rank)):
        shown: PromptLogprob = {
            "logprob": logprob,
            "rank": rank,
            "decoded_token": tokenizer.token_text(token),
        }
        found.setdefault(str(token), shown)
    return found


def _narrow(entry: TokenLogprob, top: int) -> TokenLogprob:
    """Return an entry with no more alternatives than asked for."""
    return entry if len(entry.top) <= top else replace(entry, top=entry.top[:top])
