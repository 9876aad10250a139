"""Command-line options made from settings models, so that a setting is described in one place.

Every option can also come from a `DAPE_*` environment variable or from the YAML file of `--config`;
the command line wins over the environment, and the environment over the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import BaseModel, ByteSize, ValidationError
from pydantic.fields import FieldInfo

from dape_engine.errors import SettingsError
from dape_engine.files import read_settings


class FiniteRange(click.FloatRange):
    """A range of numbers. For click NaN lies in every range, and infinity in those without an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


Command = TypeVar("Command", bound=Callable[..., Any])
Settings = TypeVar("Settings", bound=BaseModel)


def settings_options(model: type[BaseModel]) -> Callable[[Command], Command]:
    """Add one option per field of a settings model: `max_num_seqs` becomes `--max-num-seqs`."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(model.model_fields.items()):
            command = _option(name, field)(command)
        return command

    return decorate


def config_option(command: Command) -> Command:
    """Add `--config FILE.yaml`, whose entries become the defaults of the other options."""
    option = click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        envvar="DAPE_CONFIG",
        help="YAML file with any of the other options, e.g. `max_num_seqs: 8`.",
    )
    return option(command)


def build_settings(model: type[Settings], values: dict[str, Any]) -> Settings:
    """Validate the given options, leaving those not given to the model's defaults.

    Raises:
        SettingsError: a value is wrong; the message names the option, the value and the rule.
    """
    given = {k: v for k, v in values.items() if k in model.model_fields and v not in (None, ())}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        raise SettingsError(f"{option} {first['input']}: {first['msg']}") from error


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    kind = _plain_type(field.annotation)
    default = field.get_default(call_default_factory=True)
    if isinstance(default, ByteSize):
        default = default.human_readable()
    shown = f" [default: {default}]" if default not in (None, (), []) else ""
    settings: dict[str, Any] = {
        "envvar": f"DAPE_{name.upper()}",
        "help": (field.description or "").replace("\n", " ") + shown,
        "default": None,
    }
    flag = "--" + name.replace("_", "-")
    if get_origin(kind) is Literal:
        settings["type"] = click.Choice([str(choice) for choice in get_args(kind)])
    elif kind is ByteSize:
        settings["type"] = str
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        # JSON text, in a file also a mapping.
        settings["type"] = click.UNPROCESSED
    elif get_origin(kind) in (tuple, list):
        settings.update(type=str, multiple=True)
    elif kind is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    else:
        settings["type"] = kind
    return click.option(flag, name, **settings)


def _plain_type(annotation: Any) -> Any:
    """Strip Annotated and None from a field's type."""
    choices = [choice for choice in get_args(annotation) if choice is not NoneType]
    if get_origin(annotation) in (Literal, tuple, list) or not choices:
        return annotation
    return _plain_type(choices[0])


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    entries = {str(key).replace("-", "_"): value for key, value in read_settings(path).items()}
    known = {parameter.name: parameter for parameter in context.command.params}
    unknown = sorted(entries.keys() - known.keys())
    if unknown:
        raise SettingsError(f"--config {path} holds the unknown option {unknown[0]!r}")
    given = {
        name: _as_typed(path, known[name], value) for name, value in entries.items() if value is not None
    }
    context.default_map = {**(context.default_map or {}), **given}


def _as_typed(path: Path, option: click.Parameter, value: object) -> str | list[str]:
    """Return an entry as it would be typed on the command line, so that one set of rules reads both."""
    if option.multiple:
        return [str(part) for part in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, dict) and option.type is click.UNPROCESSED:
        return json.dumps(value, default=str)
    if not isinstance(value, (str, int, float)):
        raise SettingsError(
            f"--config {path}: {option.name} must be a text, a number, true or false, "
            f"got a {type(value).__name__}"
        )
    return str(value)
