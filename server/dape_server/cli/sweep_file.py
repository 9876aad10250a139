"""What the commands that read training settings share: where data are, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from pydantic import ValidationError

from dape_engine.errors import SettingsError

corpus_option = click.option(
    "--corpus",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="DAPE_CORPUS",
    default=Path(),
    help="Where relative data paths of a sweep start. [default: the current folder]",
)


@contextmanager
def settings_errors(path: Path) -> Iterator[None]:
    """Turn what can be wrong with a file of settings, or the files it names, into one line.

    Raises:
        SettingsError: names the file and the setting.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from error
