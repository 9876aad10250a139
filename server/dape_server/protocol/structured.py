"""Fields that say what a generated text must match: `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jiter
from pydantic import BeforeValidator, Field, model_validator

from dape_engine.errors import RequestError
from dape_engine.grammar import MAX_SCHEMA_BYTES, Kind
from dape_server.protocol.common import Refusal, RequestBody

ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """What `dape_engine.grammar` compiles, and the field it came in."""

    kind: Kind
    source: Any
    field: str


def _as_schema(value: Any) -> Any:
    """Read a schema that was sent as JSON text."""
    if not isinstance(value, str):
        return value
    field = "structured_outputs.json"
    if len(value) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"{field}: {len(value)} characters are above the limit of {MAX_SCHEMA_BYTES}", param=field
        )
    try:
        return jiter.from_json(value.encode(), allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        message = f"{field}: the text is not valid JSON, or not unambiguously"
        raise RequestError(message, param=field) from error


Schema = Annotated[dict[str, Any], BeforeValidator(_as_schema, json_schema_input_type=dict[str, Any] | str)]


class JsonSchemaFormat(RequestBody):
    """OpenAI's wrapping of a schema."""

    place: ClassVar[str] = "response_format.json_schema."

    name: Annotated[str, Field(max_length=64)] | None = None
    """For people only."""
    description: Annotated[str, Field(max_length=4096)] | None = None
    """For people only."""
    schema_: dict[str, Any] = Field(default=ANY_OBJECT, alias="schema")
    """By default any object."""
    strict: bool = True
    """Whatever it says, the text follows the schema."""


class ResponseFormat(RequestBody):
    """OpenAI's `response_format`."""

    place: ClassVar[str] = "response_format."

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(
                "response_format.json_schema: belongs to the type 'json_schema', and to no other",
                param="response_format.json_schema",
            )
        return self

    def grammar(self) -> GrammarSource | None:
        """Return what the text must match, None for any text."""
        if self.json_schema is not None:
            return GrammarSource("json", self.json_schema.schema_, "response_format.json_schema.schema")
        if self.type == "json_object":
            return GrammarSource("json", ANY_OBJECT, "response_format")
        return None


class StructuredOutputs(RequestBody):
    """vLLM's `structured_outputs`: exactly one of its fields."""

    place: ClassVar[str] = "structured_outputs."
    refused: ClassVar[Mapping[str, Refusal]] = {
        "structural_tag": Refusal("use `grammar`"),
        "whitespace_pattern": Refusal("use `x-guidance` inside the schema"),
        "disable_any_whitespace": Refusal("there is no whitespace by default", (True, False)),
        "disable_additional_properties": Refusal("write it into the schema", (False,)),
        "disable_fallback": Refusal("there is no other library to fall back to", (True, False)),
    }

    json_: Schema | None = Field(default=None, alias="json")
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    """A regular expression that the whole text matches."""
    choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    """The texts to choose from."""
    grammar: str | None = None
    """A grammar in Lark's form or, where it holds `::=`, in GBNF."""
    json_object: Literal[True] | None = None
    """Any JSON object."""

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise RequestError(
                f"structured_outputs: needs exactly one of its fields, got {len(self.model_fields_set)}",
                param="structured_outputs",
            )
        return self

    def source(self) -> GrammarSource:
        """Return what the text must match."""
        if self.json_object:
            return GrammarSource("json", ANY_OBJECT, "structured_outputs.json_object")
        sources: dict[Kind, Any] = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        kind, source = next((kind, source) for kind, source in sources.items() if source is not None)
        return GrammarSource(kind, source, f"structured_outputs.{kind}")
