"""Reads a server's Prometheus metrics and what the system says of its process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from dape_engine.errors import SettingsError

TIMEOUT_SECONDS = 10


def read_series(url: str, api_key: str | None = None) -> list[tuple[str, float]]:
    """Return name and value of every series of `/metrics`.

    Raises:
        SettingsError: the server has no metrics to show.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with urlopen(Request(f"{url}/metrics", headers=headers), timeout=TIMEOUT_SECONDS) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise SettingsError(f"cannot read {url}/metrics: {error}") from error
    families = text_string_to_metric_families(text)
    return [(sample.name, sample.value) for family in families for sample in family.samples]


def totals(series: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the sums over labels by name; buckets are left out."""
    sums: dict[str, float] = {}
    for name, value in series:
        if not name.endswith("_bucket"):
            sums[name] = sums.get(name, 0.0) + value
    return sums


def scrape(url: str, api_key: str | None = None) -> dict[str, float]:
    """Return the `totals` of a server's metrics. Raises: as `read_series`."""
    return totals(read_series(url, api_key))


def anonymous_memory(pid: int) -> int:
    """Return the bytes of a local process that nothing but itself holds, swapped ones too.

    Unlike the resident size this neither counts files nor hides what was swapped out.
    """
    fields = _status(pid)
    return sum(int(fields.get(name, "0").split()[0]) << 10 for name in ("RssAnon", "VmSwap"))


def count_threads(pid: int) -> int:
    """Return the number of threads of a local process."""
    return int(_status(pid)["Threads"])


def _status(pid: int) -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
