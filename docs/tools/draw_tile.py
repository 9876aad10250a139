"""Draw docs/images/tile.svg: how DAPE attention goes over keys tile by tile and stores no pair."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

OUT = Path(__file__).resolve().parents[1] / "images/tile.svg"
INK, PALE = "#263238", "#90a4ae"
SCORES, HIDDEN, ADAPTED, KEPT = "#5c6bc0", "#ef8e2c", "#2e9e6b", "#8e5aa8"
HEADS, WIDTH, KEYS = 4, 8, 16
"""As many as can be told apart; real ones are 12, 32 and 64."""
CELL = 0.16


def main() -> None:
    # The same file every time it is drawn.
    mpl.rcParams.update({"svg.hashsalt": "tile", "font.size": 10, "text.color": INK})
    figure, axes = pyplot.subplots(figsize=(10.4, 4.7), layout="constrained")
    axes.set(xlim=(0, 10.4), ylim=(0.3, 5), aspect="equal")
    axes.axis("off")
    draw_pairs(axes)
    draw_tile(axes)
    draw_kept(axes)
    figure.savefig(OUT, metadata={"Date": None})


def draw_pairs(axes: Axes) -> None:
    """The causal triangle of one sequence, with the rows of one item and the tile that it is at."""
    x, y, side, step = 0.35, 1.35, 2.5, 2.5 / 8
    axes.text(x + side / 2, y + side + 0.15, "keys j: read from the cache", ha="center")
    axes.text(x - 0.2, y + side / 2, "queries i", ha="center", va="center", rotation=90)
    axes.add_patch(Polygon([(x, y + side), (x, y), (x + side, y)], facecolor="#eceff1", edgecolor=PALE))
    top = y + 2 * step
    axes.add_patch(Rectangle((x, top), 6 * step, step, facecolor="#c5cae9", edgecolor=INK))
    for column in range(1, 6):
        axes.plot([x + column * step] * 2, [top, top + step], color=INK, linewidth=0.6)
    axes.add_patch(Rectangle((x + 3 * step, top), step, step, facecolor=SCORES, edgecolor=INK))
    arrow(axes, (x + 0.1, top - 0.14), (x + 6 * step, top - 0.14))
    axes.text(
        x + side / 2, y - 0.25, "one item: some rows,\ntile after tile of 64 keys", ha="center", va="top"
    )
    for corner, target in (((x + 4 * step, top + step), 4.4), ((x + 4 * step, top), 0.86)):
        axes.plot([corner[0], 2.9], [corner[1], target], color=PALE, linewidth=0.8, linestyle="--")


def draw_tile(axes: Axes) -> None:
    """One row of the tile: scores of all heads, hidden layer, adapted scores."""
    left, right = 3.65, 3.65 + KEYS * CELL
    axes.text(left + KEYS * CELL / 2, 4.78, "one row of one tile, in registers and cache", ha="center")
    grid(axes, left, 3.75, HEADS, SCORES)
    axes.text(right + 0.12, 4.07, "A = q·k / √d\nall heads at once", va="center")
    grid(axes, left, 1.98, WIDTH, HIDDEN)
    axes.text(right + 0.12, 2.62, "LeakyReLU(\n   W₁ᴬ·A + T(i − j))", va="center")
    grid(axes, left, 0.86, HEADS, ADAPTED)
    axes.text(right + 0.12, 1.18, "S = A + W₂·hidden\n   + R(i − j)", va="center")
    middle = left + KEYS * CELL / 2
    arrow(axes, (middle, 3.69), (middle, 3.32))
    arrow(axes, (middle, 1.92), (middle, 1.56))
    for y, rows, name in ((3.75, HEADS, "H heads"), (1.98, WIDTH, "D hidden"), (0.86, HEADS, "H heads")):
        axes.text(
            left - 0.08, y + rows * CELL / 2, name, ha="right", va="center", fontsize=8, color="#546e7a"
        )
    axes.text(
        middle,
        0.5,
        "T and R: tables of the distance, built once a layer",
        ha="center",
        fontsize=9,
        color="#546e7a",
    )


def draw_kept(axes: Axes) -> None:
    """What goes from one tile to the next."""
    left = 8.35
    axes.add_patch(Rectangle((left, 1.5), 1.85, 2.35, facecolor="#f3e5f5", edgecolor=KEPT))
    axes.text(left + 0.925, 3.6, "kept by row and head", ha="center", va="center", weight="bold", fontsize=9)
    lines = "m: largest S so far\nl: Σ exp(S − m)\no: Σ exp(S − m)·v"
    axes.text(left + 0.12, 2.85, lines, va="center", linespacing=1.7, fontsize=9)
    axes.text(left + 0.925, 1.85, "at the end: o / l", ha="center", va="center", fontsize=9)
    arrow(axes, (7.9, 1.18), (left + 0.925, 1.44), bend=0.25)
    axes.text(9.2, 0.92, "online\nsoftmax", ha="left", va="center", fontsize=9, color="#546e7a")


def grid(axes: Axes, x: float, y: float, rows: int, colour: str) -> None:
    """Draw a matrix of `rows` x KEYS cells with random shades."""
    shades = np.random.default_rng(rows).uniform(0.25, 1, (rows, KEYS))
    for row, column in np.ndindex(rows, KEYS):
        place = (x + column * CELL, y + row * CELL)
        cell = Rectangle(place, CELL, CELL, facecolor=colour, alpha=shades[row, column], edgecolor="white")
        cell.set_linewidth(0.6)
        axes.add_patch(cell)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    main()
