"""Fill the tables of the README, the model cards and docs/load_testing.md: no number is typed by hand.

Reads docs/results/extrapolation.json (`dape evaluate --json`), and of benchmarks/results engine.json (`dape
bench engine --json`), engine-llama.cpp.json (the same with `--dtype bfloat16 --peer llama.cpp`), serve.json
(`dape bench serve --json`) and load.json (`load_tests/smoke.py --json`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dape_engine.weights import SHIPPED
from dape_training.markdown import fill, table

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    results = read("docs/results/extrapolation.json")
    for name, entries in results["models"].items():
        update_card(SHIPPED / name / "README.md", {**results, "models": {name: entries}})
    readme = REPOSITORY / "README.md"
    text = fill(readme.read_text(), "results", extrapolation(results))
    text = fill(text, "speed", speed(read("benchmarks/results/engine.json")))
    text = fill(text, "peer", beside_peer(read("benchmarks/results/engine-llama.cpp.json")))
    readme.write_text(text)
    page = REPOSITORY / "docs/load_testing.md"
    text = fill(page.read_text(), "serve", serving(read("benchmarks/results/serve.json")))
    page.write_text(fill(text, "load", phases(read("benchmarks/results/load.json"))))


def read(path: str) -> Any:
    """Return the JSON of a file of this repository."""
    return json.loads((REPOSITORY / path).read_text())


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
    return table(header, rows)


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
    return f"{circumstances(results)}\n\n" + table(["", *models], rows)


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
    return f"{circumstances(results)}\n\n" + table(header, rows)


def serving(results: Any) -> str:
    """Return what streaming clients see, beside a peer where there was one, and scoring over HTTP."""
    labels = {
        "output_tokens_per_s": ("output tokens/s", 1),
        "ttft_ms_p50": ("TTFT p50, ms", 1),
        "ttft_ms_p95": ("TTFT p95, ms", 1),
        "itl_ms_p50": ("ITL p50, ms", 1),
        "itl_ms_p95": ("ITL p95, ms", 1),
        "step_share": ("engine steps, % of the time", 100),
        "model_share": ("of that model and sampler, % of the time", 100),
        "client_cores": ("client, % of a core", 100),
    }
    models: dict[str, Any] = results["models"]
    plan = results["plan"]
    header = [f"{plan['streams']} streams, {plan['prompt_tokens']} in, {plan['output_tokens']} out"]
    for name, figures in models.items():
        header += [name, *([figures["peer"]["name"], "ratio"] if "peer" in figures else [])]
    rows = []
    for key, (label, scale) in labels.items():
        cells = [label]
        for figures in models.values():
            cells.append(rounded(figures["streaming"].get(key), scale))
            if "peer" in figures:
                peer = figures["peer"]
                cells += [rounded(peer["streaming"].get(key), scale)]
                cells += [rounded(peer["own_over_peer"].get(key))]
        rows.append(cells)
    for label, pick in (
        ("the engine without HTTP, tokens/s", lambda figures: figures["engine_alone_tokens_per_s"]),
        *(
            (
                f"scoring {length} tokens, tokens/s",
                lambda figures, n=length: figures["scored_tokens_per_s"][n],
            )
            for length in map(str, plan["scored_lengths"])
        ),
    ):
        cells = [label]
        for figures in models.values():
            cells += [rounded(pick(figures)), *(["", ""] if "peer" in figures else [])]
        rows.append(cells)
    return f"{circumstances(results)}\n\n" + table(header, rows)


def phases(results: Any) -> str:
    """Return requests, throughput and times of every phase and kind of request."""
    header = [
        "phase",
        "requests",
        "refused",
        "requests/s",
        "output tokens/s",
        "TTFT, ms",
        "ITL, ms",
        "E2E, ms",
    ]
    rows = []
    extras = []
    for phase, result in results.items():
        for kind, figures in result["figures"].items():
            if kind == "all":
                continue
            counts = [f"{figures[name]:,}" for name in ("requests", "refused")]
            speeds = [rounded(figures.get(name)) for name in ("requests_per_s", "output_tokens_per_s")]
            times = [figures.get(name) for name in ("ttft_ms", "itl_ms", "e2e_ms")]
            spans = [
                " / ".join(rounded(time[p]) for p in ("p50", "p95", "p99")) if time else "" for time in times
            ]
            rows.append([f"{phase}: {kind}", *counts, *speeds, *spans])
        extras += [
            f"{phase}: {name.replace('_', ' ')} {rounded(value)}" for name, value in result["extra"].items()
        ]
    return table(header, rows) + "\n\nTimes are p50 / p95 / p99. Besides: " + "; ".join(extras) + "."


def rounded(value: float | None, scale: float = 1) -> str:
    """Return three digits or so; nothing for what was not measured."""
    if value is None:
        return ""
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


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
