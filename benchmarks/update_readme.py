"""Fill the tables of the README and of the model cards with measured numbers: none is typed by hand.

Reads docs/results/extrapolation.json (`dape evaluate --json`), and of benchmarks/results engine.json (`dape
bench engine --json`) and engine-llama.cpp.json (the same with `--dtype bfloat16 --peer llama.cpp`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dape_engine.weights import SHIPPED

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    results = read("docs/results/extrapolation.json")
    for name, entries in results["models"].items():
        update_card(SHIPPED / name / "README.md", {**results, "models": {name: entries}})
    readme = REPOSITORY / "README.md"
    text = replace(readme.read_text(), "results", extrapolation(results))
    text = replace(text, "speed", speed(read("benchmarks/results/engine.json")))
    text = replace(text, "peer", beside_peer(read("benchmarks/results/engine-llama.cpp.json")))
    readme.write_text(text)


def read(path: str) -> Any:
    """Return the JSON of a file of this repository."""
    return json.loads((REPOSITORY / path).read_text())


def replace(text: str, name: str, table: str) -> str:
    """Put a table between the markers of a section."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)


def update_card(card: Path, results: Any) -> None:
    """End a model's card with its perplexities."""
    heading = "\n## Perplexity by context length\n"
    settings = results["settings"]
    note = (
        f"The last {settings['score_last']} tokens of {settings['ends_per_document']} ends in each of the "
        "validation books, by `dape evaluate`; change of the mean loss in nats a token from the train"
        " length, paired by end.\n"
    )
    text = card.read_text().split(heading)[0]
    card.write_text(f"{text}{heading}\n{note}\n{extrapolation(results)}\n")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a table with the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def extrapolation(results: Any) -> str:
    """Return perplexity and its change by length, two columns for each model."""
    models: dict[str, list[Any]] = results["models"]
    header = ["context"]
    for name, entries in models.items():
        header += [name, f"change from {entries[0]['change_from']}"]
    rows = []
    for entries in zip(*models.values(), strict=True):
        cells = [str(entries[0]["length"])]
        for entry in entries:
            cells.append(f"{entry['perplexity']:.2f} ± {entry['stderr']:.2f}")
            cells.append(f"{entry['change']:+.4f} ± {entry['change_stderr']:.4f}")
        rows.append(cells)
    return markdown(header, rows)


def speed(results: Any) -> str:
    """Return prefill, decode and memory, one column for each model."""
    models: dict[str, Any] = results["models"]
    rows = []
    for group, label, unit in (
        ("prefill", "prefill {} tokens", "tokens/s"),
        ("decode", "decode, streams x cached tokens: {}", "tokens/s"),
        ("peak_rss_mib", "peak RSS, prompt of {}", "MiB"),
        ("peak_rss_without_cache_mib", "the same less the KV cache, prompt of {}", "MiB"),
    ):
        for case in next(iter(models.values()))[group]:
            values = [f"{figures[group][case]:,.0f} {unit}" for figures in models.values()]
            rows.append([label.format(case), *values])
    starts = [figures.get("seconds_to_first_token") for figures in models.values()]
    if None not in starts:
        rows.append(["`dape serve`, start to first token", *(f"{seconds:.1f} s" for seconds in starts)])
    return f"{circumstances(results)}\n\n" + markdown(["", *models], rows)


def beside_peer(results: Any) -> str:
    """Return tokens per second beside another engine and the ratios, three columns for each model."""
    models: dict[str, Any] = results["models"]
    header = ["tokens/s"]
    for name, figures in models.items():
        header += [name, figures["peer"]["name"], "ratio"]
    rows = []
    for group, label in (("prefill", "prefill {} tokens"), ("decode", "decode {} cached tokens")):
        for case in next(iter(models.values()))[group]:
            cells = [label.format(case)]
            for figures in models.values():
                peer = figures["peer"]
                speeds = (figures[group][case], peer[group][case])
                cells += [f"{speed:,.0f}" for speed in speeds]
                cells.append(f"{peer['engine_over_peer'][group][case]:.1f}")
            rows.append(cells)
    return f"{circumstances(results)}\n\n" + markdown(header, rows)


def circumstances(results: Any) -> str:
    """Return a line about the machine and the settings."""
    machine, dtype = results["machine"], results["settings"]["dtype"]
    # On a CPU, auto is float32.
    weights = "float32" if dtype == "auto" else dtype
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['kernels']}, "
        f"torch {machine['torch']}, weights {weights}."
    )


if __name__ == "__main__":
    main()
