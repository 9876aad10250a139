"""Prometheus metrics under vLLM's names, with the prefix `dape:`. One registry per server.

Facts about steps and requests come from the engine's thread through the observer's methods; gauges are
read from the engine's snapshot when they are scraped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

from dape_engine.request import EngineState, RequestStats, StepStats

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
INTER_TOKEN_SECONDS = (
    # vLLM's begin at 10 ms, too coarse for small models.
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BODY_BYTES = tuple(100 * 4**power for power in range(10))
STEP_TOKENS = (1, *(2**power for power in range(3, 15)))
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
COMPLETIONS = (1, 2, 5, 10, 20)
PREEMPTIONS = (0, 1, 2, 3, 4, 5, 10, 20)
LABELS = ("model_name", "engine")
M = TypeVar("M", bound=MetricWrapperBase)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request and its answer. Nothing in it is of a client's making, so all can be a label."""

    route: str
    """Template of the route, never a client's path; "other" where no route fits."""
    method: str
    """One that HTTP knows, or "other"."""
    status: int
    seconds: float
    """From the request's arrival to the last byte of its answer."""
    received: int
    """Bytes of the body that were read."""
    sent: int
    """Bytes of the answer's body."""
    error: str | None
    """Code of the error, where the answer is one or ends with one."""


@dataclass(slots=True)
class Totals:
    """Tokens since the start, for the status line of the log."""

    prompt: int = 0
    generated: int = 0
    scored: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    steps: int = 0


class Metrics:
    """The engine's observer and the registry behind /metrics.

    Args:
        model_name: label of the engine's series.
        engine: label that tells several engines of one model apart.
    """

    def __init__(self, model_name: str, engine: str = "0"):
        self.registry = CollectorRegistry()
        self.totals = Totals()
        self._listeners: list[Callable[[RequestStats], None]] = []
        ProcessCollector(registry=self.registry)
        self._labels = {"model_name": model_name, "engine": engine}
        self._make_step_metrics()
        self._make_request_metrics()
        self._make_http_metrics()

    def _make_http_metrics(self) -> None:
        self._http_requests = Counter(
            "http_requests",
            "HTTP requests, by route, method and status.",
            ("handler", "method", "status"),
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds from a request's arrival to the last byte of its answer.",
            ("handler", "method"),
            registry=self.registry,
            buckets=FIRST_TOKEN_SECONDS,
        )
        self._received, self._sent = (
            Histogram(
                f"http_{part}_size_bytes",
                f"Bytes of a {part}'s body.",
                ("handler",),
                registry=self.registry,
                buckets=BODY_BYTES,
            )
            for part in ("request", "response")
        )
        self._errors = Counter(
            "dape:request_errors",
            "Requests refused or failed, by the code of the error.",
            (*LABELS, "code"),
            registry=self.registry,
        )

    def _make_step_metrics(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._scored_tokens = self._counter("scored_tokens", "Prompt tokens given a log-probability.")
        self._preemptions = self._counter("num_preemptions", "Preemptions.")
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens of one step.", STEP_TOKENS)
        self._step_seconds = self._histogram(
            "engine_step_seconds", "Seconds of one step; their sum is the engine's busy time.", STEP_SECONDS
        )
        self._model_seconds = self._counter(
            "engine_model_seconds", "Seconds of steps in the model, the sampler and the scorer."
        )
        self._drafts = self._counter("spec_decode_num_drafts", "Proposals of tokens that were verified.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Proposed tokens verified.")
        self._accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Proposed tokens accepted.")
        self._accepted_at = Counter(
            "dape:spec_decode_num_accepted_tokens_per_pos",
            "Proposed tokens accepted, by their position in the proposal.",
            (*LABELS, "position"),
            registry=self.registry,
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Seconds between two tokens of a sequence.", INTER_TOKEN_SECONDS
        )

    def _make_request_metrics(self) -> None:
        seconds = partial(self._histogram, buckets=REQUEST_SECONDS)
        tokens = partial(self._histogram, buckets=TOKENS)
        self._success = Counter(
            "dape:request_success",
            "Finished requests, by reason.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Seconds to the first token.", FIRST_TOKEN_SECONDS
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean seconds per token after a request's first.",
            INTER_TOKEN_SECONDS,
        )
        self._whole = seconds("e2e_request_latency_seconds", "Seconds from arrival to end.")
        self._queued = seconds("request_queue_time_seconds", "Seconds in the queue.")
        self._inference = seconds("request_inference_time_seconds", "Seconds from admission to end.")
        self._prefill = seconds("request_prefill_time_seconds", "Seconds from admission to the first token.")
        self._decode = seconds("request_decode_time_seconds", "Seconds from the first token to the end.")
        self._request_prompt = tokens("request_prompt_tokens", "Prompt tokens of a request.")
        self._request_generated = tokens("request_generation_tokens", "Tokens generated by a request.")
        self._computed = tokens(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that the cache did not hold."
        )
        self._longest = tokens(
            "request_max_num_generation_tokens", "Tokens of a request's longest completion."
        )
        self._max_tokens = tokens("request_params_max_tokens", "The parameter max_tokens.")
        self._n = self._histogram("request_params_n", "The parameter n.", COMPLETIONS)
        self._request_preemptions = self._histogram(
            "request_num_preemptions", "Preemptions of a request.", PREEMPTIONS
        )

    def _counter(self, name: str, text: str) -> Counter:
        return self._labelled(Counter(f"dape:{name}", text, LABELS, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        metric = Histogram(f"dape:{name}", text, LABELS, registry=self.registry, buckets=buckets)
        return self._labelled(metric)

    def _labelled(self, metric: M) -> M:
        return metric.labels(**self._labels)

    def watch(self, state: Callable[[], EngineState], block_size: int) -> None:
        """Add the gauges, read from `state` at every scrape; a cache block holds `block_size` tokens."""
        cache = {"block_size": str(block_size), "num_blocks": str(state().total_blocks)}
        info = Gauge(
            "dape:cache_config_info",
            "Always 1; the labels describe the cache.",
            (*LABELS, *cache),
            registry=self.registry,
        )
        info.labels(**self._labels, **cache).set(1)
        gauges: dict[str, tuple[str, Callable[[EngineState], float]]] = {
            "num_requests_running": ("Sequences that run.", lambda now: now.running),
            "num_requests_waiting": ("Sequences that wait.", lambda now: now.waiting),
            "kv_cache_usage_perc": (
                "Share of the cache blocks in use, 0 to 1.",
                lambda now: 1 - now.free_blocks / now.total_blocks,
            ),
            "kv_cache_free_blocks": ("Free cache blocks, reusable too.", lambda now: now.free_blocks),
            "kv_cache_total_blocks": ("All cache blocks.", lambda now: now.total_blocks),
            "kv_cache_cached_blocks": (
                "Free cache blocks that hold a reusable prefix.",
                lambda now: now.cached_blocks,
            ),
            "num_tokens_waiting": (
                "Tokens that waiting sequences may read and generate in all.",
                lambda now: now.waiting_tokens,
            ),
            "engine_healthy": (
                "1 while the engine lives.",
                lambda now: not now.stopped and now.failure is None,
            ),
            "engine_seconds_since_progress": (
                "Seconds since a step ended while there is work; 0 when idle.",
                lambda now: now.seconds_since_progress,
            ),
        }
        for name, (text, read) in gauges.items():
            gauge = Gauge(f"dape:{name}", text, LABELS, registry=self.registry).labels(**self._labels)
            gauge.set_function(lambda read=read: float(read(state())))  # type: ignore[misc]

    def tell(self, listener: Callable[[RequestStats], None]) -> None:
        """Also call `listener` for every finished request, in that request's own context."""
        self._listeners.append(listener)

    def on_step(self, stats: StepStats) -> None:
        """Count one step; called from the engine's thread."""
        totals = self.totals
        totals.steps += 1
        totals.prompt += stats.num_prefill_tokens
        totals.generated += stats.num_generated_tokens
        totals.scored += stats.num_scored_tokens
        totals.prefix_queries += stats.prefix_queries
        totals.prefix_hits += stats.prefix_hits
        self._step_seconds.observe(stats.seconds)
        self._model_seconds.inc(stats.model_seconds)
        self._prompt_tokens.inc(stats.num_prefill_tokens)
        self._generation_tokens.inc(stats.num_generated_tokens)
        self._scored_tokens.inc(stats.num_scored_tokens)
        self._preemptions.inc(stats.num_preempted)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)
        self._step_tokens.observe(stats.num_tokens)
        for proposed, accepted in stats.drafts:
            self._drafts.inc()
            self._draft_tokens.inc(proposed)
            self._accepted_tokens.inc(accepted)
            for position in range(accepted):
                self._accepted_at.labels(**self._labels, position=str(position)).inc()
        for seconds in stats.inter_token_seconds:
            self._inter_token.observe(seconds)

    def on_finished(self, stats: RequestStats) -> None:
        """Count one finished or aborted request; called from the engine's thread."""
        for listener in self._listeners:
            listener(stats)
        self._success.labels(**self._labels, finished_reason=stats.finish_reason).inc()
        self._request_prompt.observe(stats.num_prompt_tokens)
        self._computed.observe(max(stats.num_prompt_tokens - stats.num_cached_tokens, 0))
        self._request_preemptions.observe(stats.num_preemptions)
        if stats.kind == "generate":
            self._request_generated.observe(stats.num_generated_tokens)
            self._longest.observe(stats.num_generated_tokens)
            self._max_tokens.observe(stats.max_tokens)
        times = stats.times
        if times.finished is None:
            return
        self._whole.observe(times.finished - times.queued)
        if times.scheduled is None:
            return
        self._queued.observe(times.scheduled - times.queued)
        self._inference.observe(times.finished - times.scheduled)
        if times.first_token is None:
            return
        self._first_token.observe(times.first_token - times.queued)
        self._prefill.observe(times.first_token - times.scheduled)
        decode = times.finished - times.first_token
        self._decode.observe(decode)
        if stats.num_generated_tokens > 1:
            self._per_token.observe(decode / (stats.num_generated_tokens - 1))

    def on_completion_request(self, n: int) -> None:
        """Note the parameter `n` of one completion request."""
        self._n.observe(n)

    def on_http(self, exchange: Exchange) -> None:
        """Count one HTTP request."""
        route, method = exchange.route, exchange.method
        self._http_requests.labels(route, method, str(exchange.status)).inc()
        self._http_seconds.labels(route, method).observe(exchange.seconds)
        self._received.labels(route).observe(exchange.received)
        self._sent.labels(route).observe(exchange.sent)
        if exchange.error is not None:
            self._errors.labels(**self._labels, code=exchange.error).inc()

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
