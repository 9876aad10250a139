"""The report of a sweep: means and errors by hand, verdicts, partial tables, figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import update_results

from dape_training.cost_report import cost_table
from dape_training.markdown import fill
from dape_training.sweep_numbers import STANDARD, Numbers
from dape_training.sweep_report import (
    circumstances,
    draw_report,
    perplexity_table,
    static_table,
    trend_table,
    variant_table,
)

TARGETS = [(0, 300), (0, 400), (1, 300)]


def row(run: str, seed: int, nll: dict[int, list[float]], **more: Any) -> dict[str, Any]:
    return {
        "run": run,
        "label": run.upper(),
        "static": None,
        "dape": None,
        "seed": seed,
        "parameters": 1_320_000,
        "seconds": 1800.0,
        "validation_loss": 4.0,
        "nll": {str(length): losses for length, losses in nll.items()},
        "position_nll": [4.0, 3.9],
        **more,
    }


@pytest.fixture
def content() -> dict[str, Any]:
    base = [3.0, 3.2, 3.4]
    dape = {"static": "kerple", "dape": STANDARD}
    narrow = {**STANDARD, "width": 4}
    return {
        "dataset": "books",
        "protocol": {"lengths": [128, 256], "ends_per_document": 2, "score_last": 256, "dtype": "bfloat16"},
        "train_length": 128,
        "layers": 4,
        "hidden_size": 128,
        "heads": 8,
        "vocabulary": 2048,
        "steps": 2000,
        "tokens": 4_096_000,
        "key_runs": ["kerple", "dape"],
        "runs_planned": 6,
        "runs_scored": 6,
        "targets": TARGETS,
        "position_edges": [1, 32, 64],
        "rows": [
            row("kerple", 1, {128: base, 256: [x + 0.1 for x in base]}),
            row("dape", 1, {128: [2.9, 3.1, 3.2], 256: [x + 0.1 for x in base]}, **dape),
            row(
                "dape-d4",
                1,
                {128: [2.95, 3.15, 3.25], 256: base},
                static="kerple",
                dape=narrow,
            ),
            row("learned", 1, {128: base}, position_nll=[]),
            row("kerple", 2, {128: [x + 0.2 for x in base], 256: [x + 0.2 for x in base]}),
            row("dape", 2, {128: [3.1, 3.3, 3.4], 256: [x + 0.2 for x in base]}, **dape),
        ],
    }


def cells(table: str, label: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_perplexities_are_means_over_seeds_with_their_error(content: dict[str, Any]) -> None:
    table = perplexity_table(Numbers.read(content))
    first, second = math.exp(3.2), math.exp(3.4)
    mean, error = (first + second) / 2, abs(first - second) / 2
    assert cells(table, "KERPLE")[:3] == ["KERPLE", "2", f"{mean:.2f} ± {error:.2f}"]
    assert cells(table, "LEARNED") == ["LEARNED", "1", f"{first:.2f}", "–"]
    assert cells(table, "DAPE-D4")[2] == f"**{math.exp((2.95 + 3.15 + 3.25) / 3):.2f}**"


def test_differences_are_paired_by_target_and_seed(content: dict[str, Any]) -> None:
    """Seed 1: -0.1, -0.1, -0.2; seed 2: -0.1, -0.1, -0.2: documents differ by 0.1, seeds by nothing."""
    numbers = Numbers.read(content)
    difference = numbers.difference(numbers.runs["dape"], numbers.runs["kerple"], 128)
    assert difference is not None
    assert difference.mean == pytest.approx(-0.4 / 3)
    assert difference.error == pytest.approx(0.05)
    assert cells(static_table(numbers, (128, 256)), "DAPE − KERPLE")[1:] == [
        "-0.1333 ± 0.0500, better",
        "+0.0000 ± 0.0000, no difference",
    ]


def test_the_spread_between_seeds_adds_to_the_error(content: dict[str, Any]) -> None:
    content["rows"][-1]["nll"]["128"] = [3.3, 3.5, 3.6]
    numbers = Numbers.read(content)
    difference = numbers.difference(numbers.runs["dape"], numbers.runs["kerple"], 128)
    assert difference is not None
    assert difference.mean == pytest.approx(-0.1 / 3)
    assert difference.error == pytest.approx(math.hypot(0.05, 0.1))
    assert difference.verdict == 0


def test_runs_without_a_seed_in_common_are_not_compared(content: dict[str, Any]) -> None:
    numbers = Numbers.read({**content, "rows": [content["rows"][0], content["rows"][-1]]})
    assert cells(static_table(numbers, (128,)), "DAPE − KERPLE") == ["DAPE − KERPLE", "–"]


def test_variants_are_compared_with_the_standard_form(content: dict[str, Any]) -> None:
    table = variant_table(Numbers.read(content), (128,))
    assert cells(table, "DAPE-D4 − DAPE")[1] == "+0.0500 ± 0.0000, worse"
    assert "KERPLE" not in table


def test_trends_follow_one_run_over_the_lengths(content: dict[str, Any]) -> None:
    numbers = Numbers.read(content)
    content["rows"][2]["nll"]["256"] = [2.9, 3.0, 3.2]
    table = trend_table(numbers, ["dape-d4", "learned", "no-such-run"])
    assert "| 128 → 256 |" in table
    assert cells(table, "DAPE-D4")[1] == "-0.0833 ± 0.0250, falls"
    assert cells(table, "LEARNED")[1] == "–"


def test_a_part_of_a_sweep_says_so(content: dict[str, Any]) -> None:
    whole = circumstances(Numbers.read(content))
    assert whole.startswith("All 6 runs")
    assert "4.1 M tokens in windows of 128; 3.0 core hours in all" in whole
    assert "each of 3 ends in 2 unseen documents, the same at every length, in bfloat16." in whole
    partial = circumstances(Numbers.read({**content, "runs_scored": 4}))
    assert partial.startswith("**Partial: 4 of 6 runs are there.**")


def test_figures_of_all_kinds_are_drawn(content: dict[str, Any], tmp_path: Path) -> None:
    latex = {**content, "dataset": "latex"}
    paths = draw_report([Numbers.read(content), Numbers.read(latex)], tmp_path, "sweep")
    assert [path.name for path in paths] == [
        "sweep-key.svg",
        "sweep-others.svg",
        "sweep-positions.svg",
        "sweep-ablation.svg",
    ]
    key, others, positions, ablation = (path.read_text() for path in paths)
    assert ">DAPE<" in key
    assert ">LEARNED<" not in key
    assert ">LEARNED<" in others
    assert ">KERPLE<" in positions
    assert ">DAPE-D4<" in ablation
    assert ">latex<" in key


def test_a_page_is_filled_between_its_marks() -> None:
    page = "a <!-- x:begin -->old<!-- x:end --> b"
    assert fill(page, "x", "new") == "a <!-- x:begin -->\nnew\n<!-- x:end --> b"
    with pytest.raises(ValueError, match="expected one section 'y' in the page, found 0"):
        fill(page, "y", "new")


def test_costs_are_shown_with_their_ratios() -> None:
    costs = {
        "512": {"static": 1.0, "dape": 1.25, "plain": 5.0, "dape_over_static": 1.25, "plain_over_dape": 4.0}
    }
    costs["16384"] = {"static": 2.0, "dape": 3.0, "dape_over_static": 1.5}
    table = cost_table(
        {
            "machine": {"processor": "P", "threads": 2, "kernels": "K", "torch": "T"},
            "settings": {"dtype": "auto"},
            "measured_layers": 1,
            "sizes": {"350m": {"layers": 24, "costs": costs}},
        }
    )
    assert "P, 2 threads, K, torch T, weights float32; layers measured: 1, scaled to all." in table
    assert "| 350m, 24 layers | 512 | 1 | 1.25 | 5 | 1.25 | 4 |" in table
    assert "| 350m, 24 layers | 16384 | 2 | 3 | – | 1.5 | – |" in table


def test_the_page_has_a_place_for_every_table(content: dict[str, Any], tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    content["protocol"]["lengths"] = list(update_results.COMPARED)
    page = (root / "docs/results.md").read_text()
    for sweep in update_results.SWEEPS:
        page = update_results.fill_sweep(page, sweep, [Numbers.read(content)], tmp_path)
        assert f"![{sweep}-key](results/{sweep}-key.svg)" in page
    assert page.count("| DAPE-D4 − DAPE |") == page.count("| DAPE-D4 − KERPLE |") == 2
    assert "<!-- cost:begin -->" in page
