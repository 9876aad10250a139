"""Reads a server's Prometheus metrics and the memory of its process."""

from __future__ import annotations

from pathlib import Path
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from dape_engine.errors import SettingsError

TIMEOUT_SECONDS = 10


def scrape(url: str, api_key: str | None = None) -> dict[str, float]:
    """Return every sample of `/metrics` by its name, summed over labels; buckets are left out.

    Raises:
        SettingsError: the server has no metrics to show.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with urlopen(Request(f"{url}/metrics", headers=headers), timeout=TIMEOUT_SECONDS) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise SettingsError(f"cannot read {url}/metrics: {error}") from error
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
    return samples


def anonymous_memory(pid: int) -> int:
    """Return the bytes of a local process that nothing but itself holds, swapped ones too.

    Unlike the resident size this neither counts files nor hides what was swapped out.
    """
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields.get(name, "0").split()[0]) << 10 for name in ("RssAnon", "VmSwap"))
