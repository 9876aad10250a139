"""docs/routes.md: every route with its fields, a request and its answer, from the OpenAPI description."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]
LARGEST = (1 << 31) - 1
"""A bound of every integer, not worth saying."""
HEAD = """# Routes

Every route with its fields, a request and its answer. [HTTP API](api.md) says how they work together, and
[Limits](limits.md) what each refusal means. Required fields are **bold**; `null` means the default. A running
server says the same at `GET /openapi.json`, and as a page at `GET /docs`.

The answers below came from the shipped model (the chat's from a copy with a template); numbers are rounded.
Made by `docs/tools/generate_reference.py`.
"""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer, as recorded from a server."""

    method: str
    path: str
    template: str
    """Of the route: the path with names in braces."""
    body: Any
    answer: Any
    """Parsed JSON, or text where it is none."""

    @classmethod
    def read(cls, text: str) -> list[Exchange]:
        """Return the exchanges of docs/tools/exchanges.json."""
        return [cls(**entry) for entry in json.loads(text)]

    def markdown(self) -> str:
        """Return request and answer as two blocks."""
        if self.body is None:
            command = f"curl localhost:8000{self.path}"
        else:
            body = compact(self.body, width=90)
            command = f"curl localhost:8000{self.path} -H 'content-type: application/json' \\\n  -d '{body}'"
        is_text = isinstance(self.answer, str)
        answer = self.answer.strip() if is_text else compact(self.answer)
        return f"```bash\n{command}\n```\n\n```{'text' if is_text else 'json'}\n{answer}\n```"


def compact(value: Any, indent: str = "", width: int = 100) -> str:
    """Return JSON with every object and list on one line that fits there."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) <= width or not isinstance(value, (dict, list)) or not value:
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {compact(part, inner, width)}" for key, part in value.items()]
    else:
        parts = [compact(part, inner, width) for part in value]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"


class RoutesPage:
    """Writes the page of one OpenAPI description."""

    def __init__(self, description: Schema, exchanges: list[Exchange]):
        self._paths = description["paths"]
        self._schemas = description["components"]["schemas"]
        self._exchanges = exchanges
        self._mentioned: list[str] = []
        """Schemas that a link leads to, in the order of their first mention."""

    def markdown(self) -> str:
        """Return the page."""
        routes = [
            self._route(path, method.upper(), operation)
            for path, operations in self._paths.items()
            for method, operation in operations.items()
        ]
        return "\n".join([HEAD, *routes, "## Objects\n", *self._objects()])

    def _route(self, path: str, method: str, operation: Schema) -> str:
        parts = [f"## {method} {path}\n", operation["description"] + "\n"]
        found = [e for e in self._exchanges if (e.method, e.template) == (method, path)]
        parts += [exchange.markdown() + "\n" for exchange in found]
        for parameter in operation.get("parameters", ()):
            parts.append(f"`{parameter['name']}` in the path: {self._type(parameter['schema'])}.\n")
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            parts.append(self._table("Field", self._resolve(schema), is_request=True))
        answer = operation["responses"]["200"]["content"].get("application/json", {}).get("schema")
        if answer:
            parts.append(self._table("Field of the answer", self._resolve(answer), is_request=False))
        statuses = ", ".join(status for status in sorted(operation["responses"]) if status != "200")
        parts.append(f"Besides 200: {statuses} ([errors](api.md#errors)).\n")
        return "\n".join(parts)

    def _objects(self) -> Iterator[str]:
        """Write the mentioned schemas; a row may mention further ones."""
        for name in self._mentioned:
            schema = self._schemas[name]
            yield f"### {name}\n"
            if "description" in schema:
                yield schema["description"] + "\n"
            yield self._table("Field", schema, is_request=schema.get("additionalProperties") is False)

    def _resolve(self, schema: Schema) -> Schema:
        found: Schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return found

    def _table(self, title: str, schema: Schema, *, is_request: bool) -> str:
        required = schema.get("required", ())
        rows = [f"| {title} | Type |{' Default |' if is_request else ''} |"]
        rows.append("|---" * (4 if is_request else 3) + "|")
        # Required ones first; sorting is stable.
        for name, field in sorted(schema["properties"].items(), key=lambda entry: entry[0] not in required):
            shown = f"**`{name}`**" if is_request and name in required else f"`{name}`"
            cells = [shown, self._type(field, nullable=not is_request)]
            if is_request:
                empty = field.get("default") in (None, [], {})
                cells.append("" if empty else f"`{json.dumps(field['default'])}`")
            elif name not in required and "default" not in field:
                cells[1] += ", not always there"
            cells.append(" ".join(field.get("description", "").split()))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(rows) + "\n"

    def _type(self, schema: Schema, *, nullable: bool = True) -> str:
        """Return a type in words, with its bounds."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in self._mentioned:
                self._mentioned.append(name)
            return f"[{name}](#{name.lower()})"
        if "anyOf" in schema:
            kinds = [part for part in schema["anyOf"] if nullable or part != {"type": "null"}]
            return " or ".join(self._type(kind, nullable=nullable) for kind in kinds)
        if "const" in schema:
            return f"`{json.dumps(schema['const'])}`"
        if "enum" in schema:
            return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
        match schema.get("type"):
            case "array":
                items = self._type(schema["items"])
                of = f"({items})" if "anyOf" in schema["items"] else items
                return f"list{_count(schema, 'Items', '')} of {of}"
            case "object" if isinstance(schema.get("additionalProperties"), dict):
                return f"object of {self._type(schema['additionalProperties'])}"
            case "string":
                pattern = f" matching `{schema['pattern']}`" if "pattern" in schema else ""
                return f"string{pattern}{_count(schema, 'Length', ' characters')}"
            case "integer" | "number":
                return schema["type"] + _range(schema)
            case kind:
                return str(kind)


def _range(schema: Schema) -> str:
    """Return the bounds of a number, without those that every number has."""
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    bounds = [
        f"{word} {schema[key]:g}" for key, word in words.items() if abs(schema.get(key, LARGEST)) < LARGEST
    ]
    return f" ({' '.join(bounds)})" if bounds else ""


def _count(schema: Schema, what: str, unit: str) -> str:
    """Return how many items or characters there may be."""
    least, most = schema.get(f"min{what}"), schema.get(f"max{what}")
    if most is None:
        return f" (at least {least}{unit})" if least else ""
    return f" ({least} to {most}{unit})" if least else f" (up to {most}{unit})"
