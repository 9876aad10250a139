"""Fill the tables of docs/results.md and draw its figures: no number is typed by hand.

Reads docs/results/<sweep>-<data set>.json (`dape evaluate --sweep --collect`) of every sweep,
docs/results/bias.json (`dape visualize --json`) and benchmarks/results/cost.json (`dape bench cost --json`),
those of them that are there.
"""

from __future__ import annotations

import json
from pathlib import Path

from dape_training.cost_report import cost_table
from dape_training.figures import draw_biases
from dape_training.markdown import fill
from dape_training.sweep_numbers import Numbers
from dape_training.sweep_report import (
    circumstances,
    draw_report,
    perplexity_table,
    static_table,
    trend_table,
    variant_table,
)

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs/results"
SWEEPS = ("train128", "train128-deep")
COST = REPOSITORY / "benchmarks/results/cost.json"
# Inside the train length of 128, at 16, 64 and 128 times it.
COMPARED = (128, 2048, 8192, 16384)


def main() -> None:
    path = REPOSITORY / "docs/results.md"
    page = path.read_text()
    for sweep in SWEEPS:
        files = sorted(RESULTS.glob(f"{sweep}-books.json")) + sorted(RESULTS.glob(f"{sweep}-latex.json"))
        if files:
            datasets = [Numbers.read(json.loads(file.read_text())) for file in files]
            page = fill_sweep(page, sweep, datasets, RESULTS)
    biases = RESULTS / "bias.json"
    if biases.exists():
        draw_biases(biases.with_suffix(".svg"), json.loads(biases.read_text()))
    if COST.exists():
        page = fill(page, "cost", cost_table(json.loads(COST.read_text())))
    path.write_text(page)


def fill_sweep(page: str, sweep: str, datasets: list[Numbers], folder: Path) -> str:
    """Return the page with the tables of one sweep, and with its figures, which are drawn into a folder."""
    figures = draw_report(datasets, folder, sweep)
    for section, write in (
        ("perplexity", lambda numbers: f"{circumstances(numbers)}\n\n{perplexity_table(numbers)}"),
        ("static", lambda numbers: static_table(numbers, COMPARED)),
        ("trend", lambda numbers: trend_table(numbers, numbers.key_runs)),
        ("variants", lambda numbers: variant_table(numbers, COMPARED)),
    ):
        parts = [f"**{numbers.head['dataset']}**\n\n{write(numbers)}" for numbers in datasets]
        page = fill(page, f"{sweep}-{section}", "\n\n".join(parts))
    pictures = "\n\n".join(f"![{path.stem}](results/{path.name})" for path in figures)
    return fill(page, f"{sweep}-figures", pictures)


if __name__ == "__main__":
    main()
