"""Figures as a table on the terminal and as an HTML page, with the formula beside each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dape_load.objectives import Verdict
from dape_server.load.figures import FORMULAS

WIDTH = 170
"""Of tables in a log, where no terminal says how wide it is."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #8886; padding: .25rem .75rem; text-align: right; white-space: nowrap }
th:first-child, th:last-child, td:first-child, td:last-child { text-align: left; white-space: normal }
section { overflow-x: auto }
.broken { color: #c22; font-weight: 600 }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } .broken { color: #f77 } }
"""


def rows(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[str], str]]:
    """Yield name, one cell per kind of request, and formula of every figure that was measured."""
    for name, formula in FORMULAS.items():
        values = [kind.get(name) for kind in figures.values()]
        if any(value is not None for value in values):
            yield name, [_cell(value) for value in values], formula


def show(name: str, result: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    """Print the figures of one phase and what its objectives say."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table("figure", title=f"{name}: {result['settings']['loop']}")
    kinds = _told_apart(result["figures"])
    for kind in kinds:
        table.add_column(kind, justify="right")
    table.add_column("formula (times: p50 / p95 / p99)")
    for figure, cells, formula in rows(kinds):
        table.add_row(figure, *cells, formula)
    console.print(table)
    for figure, value in result["extra"].items():
        console.print(f"{figure}: {_cell(value)}", highlight=False)
    for error in result["errors"]:
        console.print(f"error: {error}", highlight=False, markup=False)
    for verdict in verdicts:
        console.print(str(verdict), highlight=False, style="" if verdict.met else "red")


def write_html(
    path: Path, results: Mapping[str, Mapping[str, Any]], verdicts: Mapping[str, Sequence[Verdict]]
) -> None:
    """Write one page with all phases."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>Load test</title><style>{STYLE}</style><h1>Load test</h1>",
    ]
    for name, result in results.items():
        parts.append(f"<h2>{escape(name)}</h2><p>{escape(result['settings']['loop'])}, ")
        parts.append(f"model {escape(result['settings']['model'])}. Times are p50 / p95 / p99.</p>")
        kinds = _told_apart(result["figures"])
        heads = "".join(f"<th>{escape(head)}</th>" for head in ("figure", *kinds, "formula"))
        parts.append(f"<section><table><tr>{heads}</tr>")
        for row, cells, formula in rows(kinds):
            columns = "".join(f"<td>{escape(cell)}</td>" for cell in (row, *cells, formula))
            parts.append(f"<tr>{columns}</tr>")
        parts.append("</table></section><ul>")
        parts += [f"<li>{escape(key)}: {_cell(value)}</li>" for key, value in result["extra"].items()]
        parts += [f'<li class="broken">{escape(error)}</li>' for error in result["errors"]]
        for verdict in verdicts.get(name, ()):
            mark = "" if verdict.met else ' class="broken"'
            parts.append(f"<li{mark}>{escape(str(verdict))}</li>")
        parts.append("</ul>")
    path.write_text("\n".join(parts) + "</html>\n")


def _told_apart(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures without the column for all kinds where there is one kind only."""
    return figures if len(figures) != 2 else {kind: of for kind, of in figures.items() if kind != "all"}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return " / ".join(_cell(value[name]) for name in ("p50", "p95", "p99"))
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
