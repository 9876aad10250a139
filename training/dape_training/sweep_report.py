"""Tables and figures of a sweep from its result files: everything in them is computed, nothing is typed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from dape_training.figures import Curve, draw_curves
from dape_training.markdown import table
from dape_training.sweep_numbers import Difference, Numbers, Run, variants, with_static

WORDS = {-1: "better", 0: "no difference", 1: "worse"}
TRENDS = {-1: "falls", 0: "flat", 1: "rises"}
MISSING = "–"
# Perplexities above this multiple of the lowest are cut off in figures.
HIGHEST = 2.0


def circumstances(numbers: Numbers) -> str:
    """Return what was trained and scored, and whether it is all of the sweep."""
    head, protocol = numbers.head, numbers.head["protocol"]
    rows = [row for run in numbers.runs.values() for row in run.seeds.values()]
    parameters = sorted(row["parameters"] / 1e6 for row in rows)
    # YaRN's rows are the RoPE run's own.
    seconds = {
        (name.removesuffix("-yarn"), seed): row["seconds"]
        for name, run in numbers.runs.items()
        for seed, row in run.seeds.items()
    }
    state = (
        f"**Partial: {head['runs_scored']} of {head['runs_planned']} runs are there.**"
        if numbers.is_partial
        else f"All {head['runs_planned']} runs of the sweep."
    )
    documents = len({document for document, _ in head["targets"]})
    # On a CPU, auto is float32.
    dtype = "float32" if protocol["dtype"] == "auto" else protocol["dtype"]
    return (
        f"{state} Each run: {head['layers']} layers, hidden size {head['hidden_size']}, "
        f"{head['heads']} heads, vocabulary {head['vocabulary']}, {parameters[0]:.3f} to "
        f"{parameters[-1]:.3f} M parameters, {head['steps']} steps, {head['tokens'] / 1e6:.1f} M "
        f"tokens in windows of {head['train_length']}; {sum(seconds.values()) / 3600:.1f} core hours in all. "
        f"Scored: the last {protocol['score_last']} tokens before each of {len(head['targets'])} ends in "
        f"{documents} unseen documents, the same at every length, in {dtype}."
    )


def perplexity_table(numbers: Numbers) -> str:
    """Return perplexity by context length: mean over seeds with its standard error; the lowest is bold."""
    found = [(run, [run.perplexity(length) for length in numbers.lengths]) for run in numbers.runs.values()]
    columns = zip(*(cells for _, cells in found), strict=True)
    lowest = [min((cell[0] for cell in column if cell is not None), default=None) for column in columns]
    rows = []
    for run, cells in found:
        row = [run.label, str(len(run.seeds))]
        for cell, best in zip(cells, lowest, strict=True):
            row.append(MISSING if cell is None else _perplexity(*cell, bold=cell[0] == best))
        rows.append(row)
    return table(["", "seeds", *map(str, numbers.lengths)], rows)


def static_table(numbers: Numbers, at: Sequence[int]) -> str:
    """Return the difference of each DAPE run from its static encoding at some lengths, with a verdict."""
    return _difference_table(numbers, with_static(numbers), at)


def variant_table(numbers: Numbers, at: Sequence[int]) -> str:
    """Return the difference of each variant of DAPE from the standard form over the same encoding."""
    return _difference_table(numbers, variants(numbers), at)


def trend_table(numbers: Numbers, names: Sequence[str]) -> str:
    """Return the change of the loss from each length to the next for some runs, with a verdict."""
    steps = list(pairwise(numbers.lengths))
    rows = []
    for name in names:
        if name in numbers.runs:
            run = numbers.runs[name]
            changes = [numbers.difference(run, run, longer, shorter) for shorter, longer in steps]
            rows.append([run.label, *(_cell(change, TRENDS) for change in changes)])
    return table(["", *(f"{shorter} → {longer}" for shorter, longer in steps)], rows)


def _difference_table(numbers: Numbers, pairs: Sequence[tuple[Run, Run]], at: Sequence[int]) -> str:
    train = numbers.head["train_length"]
    rows = [
        [f"{run.label} − {other.label}", *(_cell(numbers.difference(run, other, n), WORDS) for n in at)]
        for run, other in pairs
    ]
    return table(["nats a token", *(f"{n} ({n / train:g}x)" for n in at)], rows)


def draw_report(datasets: Sequence[Numbers], folder: Path, name: str) -> list[Path]:
    """Draw the figures of a sweep, a panel for each data set, and return their paths."""
    length, position, loss = "context length (tokens)", "position (tokens)", "nats a token"
    figures = [
        ("key", "Perplexity by context length, key rows", length, "perplexity", _key_rows),
        ("others", "Perplexity by context length, other rows", length, "perplexity", _other_rows),
        ("positions", "Perplexity by position in one pass, key rows", position, "perplexity", _by_position),
        ("ablation", "Loss of DAPE's variants less that of the static encoding", length, loss, _ablation),
    ]
    train = datasets[0].head["train_length"]
    paths = []
    for suffix, title, xlabel, ylabel, curves_of in figures:
        panels = [(numbers.head["dataset"], curves_of(numbers)) for numbers in datasets]
        if any(curves for _, curves in panels):
            path = folder / f"{name}-{suffix}.svg"
            highest = HIGHEST if ylabel == "perplexity" else None
            draw_curves(path, title, panels, xlabel=xlabel, ylabel=ylabel, mark=train, highest=highest)
            paths.append(path)
    return paths


def _key_rows(numbers: Numbers) -> list[Curve]:
    return _by_length(numbers, [numbers.runs[name] for name in numbers.key_runs])


def _other_rows(numbers: Numbers) -> list[Curve]:
    """Return the curves of what is neither a key row nor a variant of DAPE."""
    elsewhere = {*numbers.key_runs, *(run.name for run, _ in variants(numbers))}
    return _by_length(numbers, [run for run in numbers.runs.values() if run.name not in elsewhere])


def _by_length(numbers: Numbers, runs: Sequence[Run]) -> list[Curve]:
    curves = []
    for run in runs:
        points = [(n, cell) for n in numbers.lengths if (cell := run.perplexity(n)) is not None]
        if points:
            values = [mean for _, (mean, _) in points]
            errors = [error or 0.0 for _, (_, error) in points]
            curves.append(_curve(numbers, run, [n for n, _ in points], values, errors))
    return curves


def _by_position(numbers: Numbers) -> list[Curve]:
    edges = numbers.head["position_edges"]
    curves = []
    for run in (numbers.runs[name] for name in numbers.key_runs):
        losses = [row["position_nll"] for row in run.seeds.values() if row["position_nll"]]
        if losses:
            values = [math.exp(fmean(by_seed)) for by_seed in zip(*losses, strict=True)]
            middles = [math.sqrt(low * high) for low, high in pairwise(edges)][: len(values)]
            curves.append(_curve(numbers, run, middles, values, None))
    return curves


def _ablation(numbers: Numbers) -> list[Curve]:
    """Return the loss less that of the static encoding, for every encoding of which there are variants."""
    encodings = {run.static for run, _ in variants(numbers)}
    curves: list[Curve] = []
    for run, static in with_static(numbers):
        found = [(n, numbers.difference(run, static, n)) for n in numbers.lengths]
        points = [(n, difference) for n, difference in found if difference is not None]
        if run.static in encodings and points:
            values, errors = zip(*((d.mean, d.error) for _, d in points), strict=True)
            lengths = [n for n, _ in points]
            curves.append(Curve(run.label, lengths, values, errors, color=len(curves)))
    return curves


def _curve(
    numbers: Numbers, run: Run, x: Sequence[float], y: Sequence[float], errors: Sequence[float] | None
) -> Curve:
    """Return a curve in the colour of its static encoding, dashed where that has DAPE beside it."""
    static = run.static or run.name
    names = [name for name, other in numbers.runs.items() if other.static is None]
    paired = any(other.static == run.name for other in numbers.runs.values())
    color = names.index(static) if static in names else len(names)
    return Curve(run.label, x, y, errors, dashed=paired, color=color)


def _perplexity(mean: float, error: float | None, *, bold: bool) -> str:
    digits = 2 if mean < 1000 else 0
    text = f"**{mean:,.{digits}f}**" if bold else f"{mean:,.{digits}f}"
    return text if error is None else f"{text} ± {error:,.{digits}f}"


def _cell(difference: Difference | None, words: dict[int, str]) -> str:
    if difference is None:
        return MISSING
    return f"{difference.mean:+.4f} ± {difference.error:.4f}, {words[difference.verdict]}"
