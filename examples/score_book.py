"""Score a book: its perplexity in sliding windows, and that of its end with ever more context, as CSV.

dape serve
python examples/score_book.py book.txt --lengths 128,512,2048 > book.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a book over HTTP.")
    parser.add_argument("book", type=Path, help="a text file")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--lengths", default="128,256,512,1024,2048", help="context lengths in tokens")
    parser.add_argument("--context-length", type=int, default=1024, help="tokens of a sliding window")
    options = parser.parse_args()
    request = {
        "input": options.book.read_text(encoding="utf-8"),
        "window": "sliding",
        "context_length": options.context_length,
        # The same last tokens at every length, so that only the context differs.
        "lengths": [int(length) for length in options.lengths.split(",")],
        "ladder": "suffix",
        "stream": True,
    }
    for event in events(f"{options.base_url}/v1/perplexity", request):
        if event["object"] == "perplexity.progress":
            print(f"\r{event['tokens_done']} of {event['tokens_total']} tokens", end="", file=sys.stderr)
        else:
            print(file=sys.stderr)
            write(event["data"][0])


def events(url: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Send a request and yield its server-sent events; a refusal ends the program."""
    with httpx.stream("POST", url, json=request, timeout=600) as answer:
        if answer.status_code != 200:
            sys.exit(json.loads(answer.read())["error"]["message"])
        for line in answer.iter_lines():
            # Other lines are empty, or comments that keep the connection open.
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    sys.exit(event["error"]["message"])
                yield event


def write(scores: dict[str, Any]) -> None:
    """Print a row for the windows and one for each length."""
    table = csv.writer(sys.stdout)
    table.writerow(["context", "scored", "perplexity", "stderr"])
    for name, row in (("sliding", scores), *((rung["length"], rung) for rung in scores["ladder"])):
        table.writerow([name, row["num_scored"], round(row["perplexity"], 3), round(row["stderr"], 3)])


if __name__ == "__main__":
    main()
