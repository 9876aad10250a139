"""The model's chat template: messages to the text that the model continues."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from anyio import to_thread
from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dape_engine.errors import ModelFolderError, RequestError
from dape_engine.tokenizer import TextTokenizer
from dape_server.errors import HttpError, shorten
from dape_server.limits import MAX_TEXT_BYTES
from dape_server.protocol.chat import Message


class TemplateRefusalError(Exception):
    """The template itself refuses the messages, by `raise_exception`."""


class ChatTemplate:
    """A template in the form that Hugging Face's tokenizers have, run in a sandbox.

    Raises:
        ModelFolderError: it is no valid Jinja.
    """

    def __init__(self, source: str, special: Mapping[str, str]):
        """Compile a template.

        Args:
            source: Jinja text.
            special: special tokens by their names in the template, such as `eos_token`.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, **special}
        environment.filters["tojson"] = _to_json
        try:
            self._template: Template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelFolderError(f"chat template, line {error.lineno}: {error.message}") from error

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> ChatTemplate | None:
        """Return the template of a model's tokenizer, if it has one."""
        if tokenizer.chat_template is None:
            return None
        ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
        special = {name: tokenizer.token_text(token) for name, token in ids.items() if token is not None}
        return cls(tokenizer.chat_template, special)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Return the text of a conversation.

        Args:
            messages: role, content and perhaps name of each.
            add_generation_prompt: whether the text ends where the assistant's answer begins.

        Raises:
            RequestError: the template refuses the messages or fails on them, or the text is too long.
        """
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_TEXT_BYTES:
                    raise _refusal(f"the text is longer than the limit of {MAX_TEXT_BYTES} characters")
        except TemplateRefusalError as error:
            reason = str(error)
            # A template may quote what it refuses; a client's text is not repeated.
            quoted = any(text in reason for message in messages for text in _texts(message))
            raise _refusal("they are refused" if quoted else shorten(reason)) from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise _refusal(f"it fails on these messages ({type(error).__name__})") from error
        return "".join(parts)


async def conversation(
    template: ChatTemplate | None, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    """Return the text of a conversation, off the event loop.

    Raises:
        HttpError: 400, the model has no template.
        RequestError: as `ChatTemplate.render`.
    """
    if template is None:
        raise HttpError(
            400,
            "messages: this model has no chat template; use a prompt, and /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    shown = [message.for_template() for message in messages]
    return await to_thread.run_sync(
        partial(template.render, shown, add_generation_prompt=add_generation_prompt)
    )


def _texts(message: Mapping[str, str]) -> list[str]:
    return [text for field, text in message.items() if field != "role" and text]


def _refusal(reason: str) -> RequestError:
    return RequestError(f"messages: chat template: {reason}", param="messages", code="chat_template")


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusalError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text as it is: the filter that Jinja brings along escapes it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
