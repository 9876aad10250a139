"""The table of what DAPE costs, from the numbers of `dape bench cost`."""

from __future__ import annotations

from typing import Any

from dape_training.markdown import table


def cost_table(results: dict[str, Any]) -> str:
    """Return milliseconds a token by size and length, with the ratios taken within rounds."""
    machine, settings = results["machine"], results["settings"]
    # On a CPU, auto is float32.
    weights = "float32" if settings["dtype"] == "auto" else settings["dtype"]
    layers = results["measured_layers"]
    about = (
        f"{machine['processor']}, {machine['threads']} threads, {machine['kernels']}, "
        f"torch {machine['torch']}, weights {weights}; layers measured: {layers}, scaled to all."
    )
    rows = [
        [
            f"{size}, {entry['layers']} layers",
            length,
            *(_number(costs.get(name)) for name in ("static", "dape", "plain")),
            *(_number(costs.get(name)) for name in ("dape_over_static", "plain_over_dape")),
        ]
        for size, entry in results["sizes"].items()
        for length, costs in entry["costs"].items()
    ]
    header = ["model", "prompt", "Kerple, ms a token", "DAPE-Kerple", "DAPE-Kerple in plain PyTorch"]
    return f"{about}\n\n" + table([*header, "DAPE over static", "plain over ours"], rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
