"""Figures on white, SVG, PNG or PDF by the suffix of the file: biases of one query, curves by length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dape_engine.errors import SettingsError
from dape_engine.inspection import LayerBias

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")
# Bins of the keys in a figure of biases: each shows the mean and the spread within it.
BINS = 96
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot over lengths or positions."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None
    """Standard errors of y."""
    dashed: bool = False
    color: int = 0
    """Lines of one number share a colour."""


def check_suffix(path: Path, option: str) -> None:
    """Refuse a picture format that is not written.

    Raises:
        SettingsError: names the option and the suffixes.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"{option} {path}: expected a file that ends with {', '.join(SUFFIXES)}")


def summarise_biases(
    model: str, query: int, keys: Sequence[int], layers: Sequence[LayerBias]
) -> dict[str, Any]:
    """Return what `draw_biases` draws, plain numbers: of neighbouring keys the mean and the middle 80 %.

    Args:
        model: its name.
        query: position of the query.
        keys: positions of the keys.
        layers: the biases of the query at these keys.
    """
    groups = np.array_split(np.arange(len(keys)), min(BINS, len(keys)))

    def summary(heads: NDArray[Any]) -> dict[str, list[list[float]]]:
        parts = [heads[:, group] for group in groups]
        low, high = (
            np.stack([np.quantile(part, share, axis=1) for part in parts], 1) for share in (0.1, 0.9)
        )
        mean = np.stack([part.mean(1) for part in parts], 1)
        return {
            name: np.round(values.astype(float), DIGITS).tolist()
            for name, values in (("mean", mean), ("low", low), ("high", high))
        }

    return {
        "model": model,
        "query": query,
        "keys": [float(np.mean([keys[index] for index in group])) for group in groups],
        "layers": [
            {
                "layer": layer.layer,
                "static": summary(layer.static_bias),
                "adapted": summary(layer.adapted_bias),
            }
            for layer in layers
        ],
    }


def draw_biases(path: Path, biases: dict[str, Any]) -> None:
    """Draw what one query adds to its scores: a row for each layer, static bias left, adapted bias right.

    The two sides have scales of their own. Every head is a line through the means of neighbouring keys; the
    shade around it holds the middle 80 % of them, since the adapted bias also depends on what the keys say.

    Args:
        path: of the picture.
        biases: as of `summarise_biases`.
    """
    query, layers = biases["query"], biases["layers"]
    title = f"{biases['model']}: bias at query position {query}"
    with _figure(path, title, len(layers), 2, size=(10, 0.6 + 2.6 * len(layers)), sharex=True) as grid:
        for row, (axes, layer) in enumerate(zip(grid, layers, strict=True)):
            for axis, part, name in (
                (axes[0], layer["static"], "static bias B"),
                (axes[1], layer["adapted"], "adapted bias B + f(A, B)"),
            ):
                for head, (mean, low, high) in enumerate(
                    zip(part["mean"], part["low"], part["high"], strict=True)
                ):
                    color = f"C{head % 10}"
                    axis.fill_between(biases["keys"], low, high, color=color, alpha=0.15, linewidth=0)
                    axis.plot(biases["keys"], mean, color=color, linewidth=1.2, label=str(head))
                axis.set_title(f"layer {layer['layer']}: {name}", fontsize=10)
                axis.axhline(0, color="black", linewidth=0.5)
                axis.grid(alpha=0.3)
                if row == len(layers) - 1:
                    axis.set_xlabel("key position")
            axes[0].set_ylabel(f"bias of query {query} (nats)")
        grid[0][1].legend(title="head", fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def draw_curves(
    path: Path,
    title: str,
    panels: Sequence[tuple[str, Sequence[Curve]]],
    *,
    xlabel: str,
    ylabel: str,
    mark: float | None = None,
    highest: float | None = None,
) -> None:
    """Draw panels of curves side by side over a logarithmic axis.

    Args:
        path: of the picture.
        title: above all.
        panels: (title, curves) of each.
        xlabel: of every panel.
        ylabel: of the first.
        mark: where a vertical line stands, e.g. the train length.
        highest: what is above this multiple of the lowest value of a panel is cut off.
    """
    with _figure(path, title, 1, len(panels), size=(5.2 * len(panels) + 1.5, 4.2)) as grid:
        for axis, (name, curves) in zip(grid[0], panels, strict=True):
            for curve in curves:
                style = {"linestyle": "--" if curve.dashed else "-", "color": f"C{curve.color % 10}"}
                axis.errorbar(
                    curve.x,
                    curve.y,
                    curve.errors,
                    label=curve.label,
                    marker="o",
                    markersize=3,
                    capsize=2,
                    **style,
                )
            axis.set_xscale("log", base=2)
            _limit(axis, curves, highest)
            if mark is not None:
                axis.axvline(mark, color="grey", linewidth=0.8, linestyle=":")
            axis.set(title=name, xlabel=xlabel)
            axis.grid(alpha=0.3)
        grid[0][0].set_ylabel(ylabel)
        grid[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)


def _limit(axis: Axes, curves: Sequence[Curve], highest: float | None) -> None:
    """Label the powers of two that the curves span, and cut off what is far above the lowest value."""
    places = [x for curve in curves for x in curve.x] or [1]
    octaves = range(math.ceil(math.log2(min(places))), math.floor(math.log2(max(places))) + 1)
    axis.set_xticks([2**octave for octave in octaves], [str(2**octave) for octave in octaves])
    axis.tick_params(axis="x", labelrotation=45, labelsize=8)
    axis.minorticks_off()
    if highest is not None and curves:
        lowest = min(y for curve in curves for y in curve.y)
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 0.97 * lowest), min(high, highest * lowest))


@contextmanager
def _figure(
    path: Path, title: str, rows: int, columns: int, *, size: tuple[float, float], **options: Any
) -> Iterator[Any]:
    """Yield the grid of axes and save the figure at the end of the block.

    Raises:
        SettingsError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    # The same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": "dape", "svg.fonttype": "none"}):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, **options
        )
        try:
            figure.suptitle(title)
            yield grid
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, dpi=120, metadata=metadata, facecolor="white")
        except OSError as error:
            raise SettingsError(f"cannot write the picture {path}: {error.strerror or error}") from error
        finally:
            pyplot.close(figure)
