"""One /metrics for a server and all of its replicas.

The engines' series come from the replicas, told apart by the label `engine`; what is counted at the door
comes from the server, as `engine="front"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.registry import Collector

from dape_engine.request import EngineState
from dape_server.metrics import LABELS, Metrics

FRONT = "front"
ENGINES, PROCESSES = "dape:", "process_"
"""Prefixes of the families that replicas are asked for."""
OF_THE_DOOR = frozenset(
    f"dape:{name}" for name in ("request_errors", "request_params_n", "requests_moved", "replicas")
)
"""Families of the first prefix that the server itself counts."""


class FrontMetrics(Metrics):
    """The figures of a server whose engines are elsewhere.

    Args:
        model_name: label of the series.
        reports: returns the label and the families of every replica.
    """

    def __init__(self, model_name: str, reports: Callable[[], Iterable[tuple[str, Iterable[Metric]]]]):
        super().__init__(model_name, FRONT)
        self._reports = reports
        text = "Requests sent to another replica because theirs was lost or refused them."
        moved = Counter("dape:requests_moved", text, LABELS, registry=self.registry)
        self.moved = moved.labels(model_name, FRONT)
        self._replicas = Gauge("dape:replicas", "Replicas that answer.", LABELS, registry=self.registry)

    def watch(self, _state: Callable[[], EngineState], _block_size: int) -> None:
        """Add no gauges of an engine: every replica has its own."""
        self._replicas.labels(*self._labels.values()).set_function(lambda: len(list(self._reports())))

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format, those of replicas as of their last report."""
        registry = CollectorRegistry()
        registry.register(_Families(merged(self.registry.collect(), self._reports())))
        return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]):
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        yield from self._families


def merged(front: Iterable[Metric], replicas: Iterable[tuple[str, Iterable[Metric]]]) -> list[Metric]:
    """Return the families of the server and, under the same names, those of its replicas.

    Nothing is counted twice: HTTP is the server's affair, and steps and requests are the replicas'.

    Args:
        front: of the server.
        replicas: label and families of each.
    """
    found = {
        family.name: family
        for family in front
        if family.name in OF_THE_DOOR or not family.name.startswith(ENGINES)
    }
    for engine, families in replicas:
        for family in families:
            if not family.name.startswith((ENGINES, PROCESSES)):
                continue
            if (target := found.get(family.name)) is None:
                target = found[family.name] = Metric(
                    family.name, family.documentation, family.type, family.unit
                )
            target.samples += [
                sample._replace(labels={**sample.labels, "engine": engine}) for sample in family.samples
            ]
    return list(found.values())
