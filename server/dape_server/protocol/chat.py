"""POST /v1/chat/completions: OpenAI's body with vLLM's extras, and the answer's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import BeforeValidator, Field, model_validator

from dape_engine.errors import RequestError
from dape_server.limits import MAX_LOGPROBS, MAX_MESSAGES, MAX_PARTS
from dape_server.protocol.common import Positive, Refusal, RequestBody, Shape, Usage
from dape_server.protocol.generation import (
    NOT_UNDERSTOOD,
    GenerationBody,
    PromptLogprobs,
    PromptProgressReport,
)

NO_TOOLS = Refusal("the models call no tools", ([],))
NO_CHOICE_OF_TOOLS = Refusal("the models call no tools", ("none", "auto"))
NO_TEMPLATES = Refusal("the model's own chat template is used as it is", ({},))


class TextPart(Shape):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _as_text(value: Any) -> Any:
    """Join the parts of a content."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_PARTS:
        raise RequestError(
            f"messages: {len(value)} parts of a content are above the limit of {MAX_PARTS}", param="messages"
        )
    for index, part in enumerate(value):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise RequestError(
                f"messages: part {index} of a content must be of type 'text' and have a text",
                param="messages",
            )
    return "\n".join(part["text"] for part in value)


class Message(RequestBody):
    """One message of a conversation."""

    place: ClassVar[str] = "messages."
    refused: ClassVar[Mapping[str, Refusal]] = {
        "tool_calls": NO_TOOLS,
        "tool_call_id": NO_TOOLS,
        "function_call": NO_TOOLS,
        "refusal": Refusal("the models do not refuse"),
        "audio": Refusal("texts only"),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | list[TextPart])]
    """A text, or a list of text parts, which are joined by line breaks."""
    name: Annotated[str, Field(max_length=256)] | None = None
    """For templates that show it."""

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates expect it."""
        return self.model_dump(exclude_none=True)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(GenerationBody):
    """A request for the assistant's next message."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **NOT_UNDERSTOOD,
        "tools": NO_TOOLS,
        "functions": NO_TOOLS,
        "tool_choice": NO_CHOICE_OF_TOOLS,
        "function_call": NO_CHOICE_OF_TOOLS,
        "parallel_tool_calls": Refusal("the models call no tools", (True, False)),
        "chat_template": NO_TEMPLATES,
        "chat_template_kwargs": NO_TEMPLATES,
        "documents": Refusal("write them into a message", ([],)),
        "continue_final_message": Refusal("use /v1/completions", (False,)),
        "echo": Refusal("use /v1/completions", (False,)),
        "best_of": Refusal("use `n`"),
        "modalities": Refusal("texts only", (["text"],)),
        "audio": Refusal("texts only"),
        "prediction": Refusal("nothing is predicted ahead"),
        "reasoning_effort": Refusal("the models do not think apart", ("none",)),
        "verbosity": Refusal("say it in a message"),
        "web_search_options": Refusal("the models search for nothing"),
        "store": Refusal("nothing is stored", (False,)),
        "metadata": Refusal("nothing is stored", ({},)),
        "service_tier": Refusal("use `priority`", ("auto", "default")),
        "safety_identifier": Refusal("use `user`"),
        "prompt_cache_key": Refusal("use `cache_salt`"),
    }

    messages: Messages
    max_completion_tokens: Positive | None = None
    """By default as many tokens as fit behind the prompt."""
    max_tokens: Positive | None = None
    """The older name of `max_completion_tokens`."""
    logprobs: bool = False
    """Whether log-probabilities of the message's tokens are reported."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    """Alternatives reported per token; only with `logprobs`."""
    add_generation_prompt: bool = True
    """Whether the template's text ends with the beginning of an assistant's message."""
    add_special_tokens: bool = False
    """Whether the template's text gets the tokenizer's own special tokens once more."""

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def tokens_wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise RequestError(
                f"max_tokens: {self.max_tokens} is not max_completion_tokens {self.max_completion_tokens}; "
                "one of them is enough",
                param="max_tokens",
            )
        for field in ("top_logprobs", "logprob_token_ids"):
            if getattr(self, field) and not self.logprobs:
                raise RequestError(f"{field}: only with logprobs", param=field)
        return self


class ChatTokenLogprob(Shape):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatTokenLogprob):
    """A token of the answer and the alternatives at its place."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(Shape):
    """The tokens of the answer."""

    content: list[ChatLogprob]
    refusal: None


class ChatMessage(Shape):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str


class Delta(Shape):
    """What a message gained; its first chunk says whose it is."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChoiceBase(Shape):
    """What a choice and a piece of one have in common."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    """ "stop" or "length"; null in a stream before the end."""
    stop_reason: int | str | None
    """The stop string or the id of the stop token that ended the text, or "timeout"; null otherwise."""
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class ChatChoice(ChoiceBase):
    """One answer."""

    message: ChatMessage


class ChatPiece(ChoiceBase):
    """What one answer gained since the last chunk of a stream."""

    delta: Delta


class ChatCompletion(Shape):
    """The answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Shape):
    """One chunk of the answer's stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatPiece]
    usage: NotRequired[Usage | None]
    prompt_progress: NotRequired[PromptProgressReport]
