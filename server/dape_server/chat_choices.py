"""The engine's outputs as the choices of a chat: messages and deltas."""

from __future__ import annotations

from collections.abc import Sequence

from dape_engine.request import GenerationOutput
from dape_engine.tokenizer import TextTokenizer
from dape_server.choices import prompt_logprobs, token_name
from dape_server.protocol.chat import (
    ChatChoice,
    ChatLogprobs,
    ChatPiece,
    ChatRequest,
    ChatTokenLogprob,
    ChoiceBase,
)
from dape_server.text import EncodedPrompt


class ChatWriter:
    """Writes one message of the assistant, output by output, or the whole of it."""

    def __init__(self, index: int, prompt: EncodedPrompt, body: ChatRequest, tokenizer: TextTokenizer):
        self._index = index
        self._prompt = prompt
        self._body = body
        self._tokenizer = tokenizer
        self._name = token_name(body, tokenizer)
        self._begun = False

    def pieces(self, output: GenerationOutput) -> Sequence[ChatPiece]:
        """Return what one output adds to a stream; the first one is preceded by the role."""
        piece: ChatPiece = {**self._base(output), "delta": {"content": output.text}}
        if self._begun:
            return [piece]
        self._begun = True
        opening: ChatPiece = {
            "index": self._index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
        if self._body.return_token_ids:
            opening["prompt_token_ids"] = list(self._prompt.token_ids)
        return [opening, piece]

    def whole(self, output: GenerationOutput) -> ChatChoice:
        """Return the finished choice."""
        choice: ChatChoice = {
            **self._base(output),
            "message": {"role": "assistant", "content": output.text},
        }
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompt.token_ids)
        if (top := self._body.prompt_logprobs) is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output, top, self._tokenizer)
        return choice

    def _base(self, output: GenerationOutput) -> ChoiceBase:
        base: ChoiceBase = {
            "index": self._index,
            "logprobs": self._logprobs(output) if self._body.logprobs else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            base["token_ids"] = list(output.token_ids)
        return base

    def _logprobs(self, output: GenerationOutput) -> ChatLogprobs:
        return {
            "content": [
                {
                    **self._entry(entry.token_id, entry.logprob),
                    "top_logprobs": [self._entry(*other) for other in entry.top],
                }
                for entry in output.logprobs
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> ChatTokenLogprob:
        return {
            "token": self._name(token),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token)),
        }
