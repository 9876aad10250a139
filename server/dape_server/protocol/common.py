"""What the bodies of all routes share: strictness, prompts, counts, usage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NotRequired, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict

from dape_engine.errors import RequestError
from dape_server.errors import shorten
from dape_server.limits import (
    MAX_CACHE_SALT_CHARS,
    MAX_INT,
    MAX_PROMPTS,
    MAX_SECONDS,
    MAX_USER_CHARS,
    REQUEST_ID,
)

Count: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INT)]
Positive: TypeAlias = Annotated[int, Field(ge=1, le=MAX_INT)]
TokenId: TypeAlias = Count
Prompt: TypeAlias = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field that clients know from elsewhere is not served."""

    reason: str
    off: tuple[object, ...] = ()
    """Values, beside null, by which a client asks for nothing: these are taken."""


class RequestBody(BaseModel):
    """A strict body: no conversions, no unknown fields, no NaN or infinity; null means the default."""

    refused: ClassVar[Mapping[str, Refusal]] = {}
    """Fields that are refused with a reason."""
    place: ClassVar[str] = ""
    """What comes before the fields' names where this is a part of a body."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_and_given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if not body.keys().isdisjoint(cls.refused):
            body = {name: value for name, value in body.items() if not cls._asks_for_nothing(name, value)}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if len(body) > len(known):
            # Named here, before every one of perhaps a million unknown fields gets an error of its own.
            name = shorten(cls.place + next(field for field in body if field not in known))
            raise RequestError(f"{name}: unknown field", param=name, code="unknown_field")
        return {k: v for k, v in body.items() if v is not None or k not in known}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: object) -> bool:
        """Tell whether the field is one that is not served, and switched off."""
        refusal = cls.refused.get(name)
        if refusal is None:
            return False
        # To Python 1 and True are equal.
        if value is None or any(value == off and type(value) is type(off) for off in refusal.off):
            return True
        name = cls.place + name
        raise RequestError(
            f"{name}: is not supported: {refusal.reason}", param=name, code="unsupported_parameter"
        )


class WorkBody(RequestBody):
    """A body that asks the engine for work: whose it is, how urgent, and how long it may take."""

    priority: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = None
    """Lower goes first; by default 0 for generation and 1, background, for scoring."""
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    """Users share the engine evenly. Where the server has keys, a key stands for its user instead."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)] | None = None
    """Cached prefixes are shared only between requests of the same salt."""
    request_id: Annotated[str, Field(pattern=rf"^{REQUEST_ID}$")] | None = None
    """Name of the request in its answer and in logs; the header X-Request-Id goes before it."""
    timeout: Annotated[float, Field(gt=0, le=MAX_SECONDS)] | None = None
    """Seconds after which the request ends, finished or not; at most the server's `request_timeout`."""


def _as_prompts(value: object, info: ValidationInfo) -> tuple[Prompt, ...]:
    """Read a text, a list of texts, token ids, or a list of lists of token ids."""
    name = info.field_name or "prompt"
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise RequestError(f"{name}: must be a text, token ids, or a list of either", param=name)
    if not value:
        raise RequestError(f"{name}: must not be an empty list", param=name)
    if type(value[0]) is int:
        return (_as_token_ids(value, name),)
    if len(value) > MAX_PROMPTS:
        raise RequestError(f"{name}: {len(value)} prompts are above the limit of {MAX_PROMPTS}", param=name)
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    return tuple(_as_token_ids(item, name, f"[{index}]") for index, item in enumerate(value))


def _as_token_ids(value: object, name: str, place: str = "") -> tuple[int, ...]:
    if not isinstance(value, list):
        raise RequestError(f"{name}{place}: texts and token ids cannot be mixed", param=name)
    # A million tokens are checked on the event loop, hence without a loop in Python.
    if not set(map(type, value)) <= {int}:
        index = next(index for index, token in enumerate(value) if type(token) is not int)
        raise RequestError(f"{name}{place}[{index}]: must be a token id, that is an integer", param=name)
    return tuple(value)


Prompts: TypeAlias = Annotated[
    tuple[Prompt, ...],
    PlainValidator(_as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


@with_config(ConfigDict(use_attribute_docstrings=True))
class Shape(TypedDict):
    """A part of an answer. What stands below its fields goes into the OpenAPI description."""


class PromptTokensDetails(Shape):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(Shape):
    """Tokens read and generated by one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]
