"""Requests that begin alike, to a server with replicas: what was in a cache, and what each replica did.

dape serve --replicas 2
python examples/replicas.py
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import httpx
from prometheus_client.parser import text_string_to_metric_families

TEXTS = {
    "the storm": "It was a dark and stormy night, and the rain fell in torrents upon the roofs. ",
    "the sea": "The old captain looked at the sea for a long while and did not say a word. ",
    "the house": "There was a house at the end of the lane in which nobody had lived for years. ",
}
REPEATED = 3
ENDINGS = ("Then", "Nobody", "At last")
COUNTED = {
    "dape:prompt_tokens": "tokens read",
    "dape:prefix_cache_hits": "taken from the cache",
    "dape:generation_tokens": "tokens written",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions to a server with replicas.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none", help="where the server has keys")
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {options.api_key}"}
    with httpx.Client(base_url=options.base_url, headers=headers, timeout=60) as client:
        for ending in ENDINGS:
            for name, text in TEXTS.items():
                body = {"prompt": text * REPEATED + ending, "max_tokens": 8}
                answer = client.post("/v1/completions", json=body).raise_for_status().json()
                usage = answer["usage"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                print(f"{name}, {ending}: {cached} of {usage['prompt_tokens']} tokens were cached")
        # Replicas report once a second.
        time.sleep(2)
        for engine, figures in sorted(by_engine(client.get("/metrics").text).items()):
            print(f"replica {engine}: " + ", ".join(f"{n} {value:.0f}" for n, value in figures.items()))


def by_engine(exposition: str) -> dict[str, dict[str, float]]:
    """Return the figures of every replica."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if family.name in COUNTED and sample.name.endswith("_total"):
                found[sample.labels["engine"]][COUNTED[family.name]] = sample.value
    return found


if __name__ == "__main__":
    main()
