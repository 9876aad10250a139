"""The table that `dape score` prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAVY
from rich.table import Table

from dape_engine.statistics import PairedDifference, Statistics
from dape_server.cli.score_rows import Row

ALL_FILES = "all files"
MOST_LISTED = 100
"""Of more documents only the sums are shown."""


def score_table(model: str, results: dict[str, list[Row]], window: str | None) -> Table:
    """Return the rows of every document, and their sums where there are several.

    Args:
        model: its name.
        results: the rows by document.
        window: the mode, where rows are by windows.
    """
    compared = any(row.difference for rows in results.values() for row in rows)
    caption = "difference: mean NLL less the reference's, of the tokens that both score" if compared else None
    table = Table(title=f"{model}: perplexity", caption=caption, box=SIMPLE_HEAVY)
    table.add_column("file", overflow="fold", min_width=len(ALL_FILES))
    table.add_column("window" if window else "length", justify="left" if window else "right", no_wrap=True)
    # Where both do not fit a narrow terminal, the difference tells more than the logarithm of the perplexity.
    columns = ("scored", "perplexity", "bits/byte", "difference" if compared else "mean NLL")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, rows in results.items() if len(results) <= MOST_LISTED else ():
        for place, row in enumerate(rows):
            cells = _cells(row.label, row.statistics, row.difference)
            table.add_row("" if place else name, *cells)
        if len(rows) > 1:
            table.add_section()
    table.add_section()
    for place, (label, total, difference) in enumerate(_totals(results)):
        table.add_row("" if place else ALL_FILES, *_cells(label, total, difference), style="bold")
    return table


def _totals(results: dict[str, list[Row]]) -> list[tuple[int | str, Statistics, PairedDifference | None]]:
    """Return the sums of several files at each length that all of them have, or of their windows."""
    if len(results) < 2:
        return []
    totals = []
    for first in next(iter(results.values())):
        same = [row for rows in results.values() for row in rows if row.label == first.label]
        if len(same) == len(results):
            differences = [row.difference for row in same if row.difference is not None]
            totals.append(
                (
                    first.label,
                    sum((row.statistics for row in same), Statistics()),
                    sum(differences, PairedDifference()) if differences else None,
                )
            )
    return totals


def _cells(label: int | str, numbers: Statistics, difference: PairedDifference | None) -> list[str]:
    cells = [
        str(label),
        str(numbers.num_scored),
        f"{_number(numbers.perplexity, 3)} ± {_number(numbers.perplexity_stderr, 3)}",
        _number(numbers.bits_per_byte, 4),
    ]
    if difference is None or difference.mean_difference is None:
        return [*cells, _number(numbers.mean_nll, 4)]
    return [*cells, f"{difference.mean_difference:+.4f} ± {_number(difference.stderr, 4)}"]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
