"""docs/commands.md: every command of `dape` with every option, from click."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import click

HEAD = """# Commands

Every command with every option. What has a `DAPE_*` variable can also stand in the YAML file of `--config`,
as in `max_num_seqs: 8`. The command line wins over the variable, and that over the file. A mistake is one
line and exit code 2. Made by `docs/tools/generate_reference.py`.
"""
ENGINE = """## Options of the engine

Of all commands that run a model.
"""
DEFAULT = re.compile(r" *\[default: (?P<value>.*)\]$")


def commands_page(root: click.Group, engine: Collection[str]) -> str:
    """Return the page of a command and all below it.

    Args:
        root: the command.
        engine: parameters that several commands have, all of them or none; they get a section of their own.
    """
    sections, shared = [], ""
    for context in _walk(click.Context(root, info_name="dape")):
        command = context.command
        options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
        own = [option for option in options if option.name not in engine]
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        parts = [f"## {context.command_path}\n", f"```text\n{usage}\n```\n", _prose(command.help or "")]
        parts += [_table(own, context)] if own else []
        if len(own) < len(options):
            parts.append("And the [options of the engine](#options-of-the-engine).\n")
            shared = _table([option for option in options if option.name in engine], context)
        sections.append("\n".join(parts))
    return "\n".join([HEAD, *sections, ENGINE, shared])


def _walk(context: click.Context) -> Iterator[click.Context]:
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None:
                yield from _walk(click.Context(command, info_name=name, parent=context))


def _table(options: list[click.Option], context: click.Context) -> str:
    rows = [_row(option, context) for option in options]
    # Without variables their column is left out.
    used = [column for column in range(4) if column != 2 or any(row[2] for row in rows)]
    lines = [["Option", "Default", "Variable", ""], ["---"] * 4, *rows]
    return "\n".join("| " + " | ".join(line[column] for column in used) + " |" for line in lines) + "\n"


def _prose(text: str) -> str:
    """Return a help text in Markdown: what click is to leave as it is stays so."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        literal = paragraph.removeprefix("\b\n")
        plain = " ".join(paragraph.split()).replace("<", "&lt;")
        paragraphs.append(f"```text\n{literal}\n```" if literal != paragraph else plain)
    return "\n\n".join(paragraphs) + "\n"


def _row(option: click.Option, context: click.Context) -> list[str]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    text = option.help or ""
    found = DEFAULT.search(text)
    default = found["value"] if found else _shown(option.get_default(context, call=False))
    cells = [
        names if option.is_flag or option.count else f"{names} `{_kind(option)}`",
        "required" if option.required else f"`{default}`" if default else "",
        f"`{option.envvar}`" if isinstance(option.envvar, str) else "",
        DEFAULT.sub("", text).replace("<", "&lt;"),
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def _kind(option: click.Option) -> str:
    """Return what stands behind the option."""
    if option.metavar is not None:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return ", ".join(map(str, option.type.choices))
    return option.type.name.removesuffix(" range").upper()


def _shown(default: Any) -> str:
    """Return a default as it would be typed, nothing for flags that are off and options not given."""
    if isinstance(default, bool) or not isinstance(default, (str, int, float, tuple)):
        return ""
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
