"""Prometheus metrics: counters and histograms of the models and of the HTTP door.

Names follow the field (`num_requests_running`, `time_to_first_token_seconds` …) with our prefix, base units and the
one label `model`; nothing that a client can invent becomes a label. Every series of a model exists at 0 from the
moment `for_model` names it, so that a rate over a quiet box is 0 and not absent.
Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from appliance.core.types import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What `Metrics.render` writes."""

PREFIX = "appliance_"

TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds for the time between two tokens."""

WAIT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
"""Upper bounds for what a client waits before its first token."""

REQUEST_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
"""Upper bounds for a whole request."""


class Metrics:
    """Owns every metric of the process, in its own registry: two appliances in one test do not meet.

    Attributes:
        registry: Where a further room may register its own collector.
    """

    def __init__(self) -> None:
        # The client library would add a `_created` series beside each counter and histogram. Prometheus does not
        # ask for them in this format, and the library has only this process-wide switch; nobody else here uses it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._families = _ModelFamilies(self.registry)
        self._models: dict[str, ModelMetrics] = {}
        self._http_requests = Counter(
            f"{PREFIX}http_requests", "HTTP requests answered", ["route", "status"], registry=self.registry
        )
        self._http_running = Gauge(
            f"{PREFIX}http_requests_in_progress", "HTTP requests being answered", registry=self.registry
        )

    def render(self) -> bytes:
        """Return every series in the text format that `CONTENT_TYPE` names."""
        return generate_latest(self.registry)

    def for_model(self, name: str) -> ModelMetrics:
        """Return the series of one model, made at 0 on the first call for this name."""
        if name not in self._models:
            self._models[name] = ModelMetrics(self._families, name)
        return self._models[name]

    def http_started(self) -> None:
        """Count a request that came in."""
        self._http_running.inc()

    def http_finished(self, route: str, status: int) -> None:
        """Count a request that was answered.

        Args:
            route: The route's template (`/v1/models/{model}`), never the path that a client sent.
            status: The HTTP status; 499 for a client that left before its answer.
        """
        self._http_running.dec()
        self._http_requests.labels(route, str(status)).inc()


class _ModelFamilies:
    """The metrics that have a series for each model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(stem: str, meaning: str, *labels: str) -> Counter:
            return Counter(PREFIX + stem, meaning, ["model", *labels], registry=registry)

        def gauge(stem: str, meaning: str) -> Gauge:
            return Gauge(PREFIX + stem, meaning, ["model"], registry=registry)

        def histogram(stem: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + stem, meaning, ["model"], buckets=buckets, registry=registry)

        self.running = gauge("num_requests_running", "Requests that hold a sequence")
        self.waiting = gauge("num_requests_waiting", "Requests in the queue")
        self.cache_usage = gauge("kv_cache_usage_ratio", "Share of the KV cells in use, 0 to 1")
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.generation_tokens = counter("generation_tokens", "Generated tokens")
        self.success = counter("request_success", "Finished requests", "finish_reason")
        self.first_token = histogram("time_to_first_token_seconds", "Time to first token", WAIT_BUCKETS_S)
        self.inter_token = histogram("inter_token_latency_seconds", "Time between tokens", TOKEN_BUCKETS_S)
        self.queue_time = histogram("request_queue_time_seconds", "Time in the queue", WAIT_BUCKETS_S)
        self.prefill_time = histogram("request_prefill_time_seconds", "Time of the prefill", WAIT_BUCKETS_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Time from arrival to end", REQUEST_BUCKETS_S)


class ModelMetrics:
    """The series of one model. Calls take microseconds and may come from any thread."""

    def __init__(self, families: _ModelFamilies, model: str) -> None:
        """Make every series at 0; use `Metrics.for_model`."""
        self._running = families.running.labels(model)
        self._waiting = families.waiting.labels(model)
        self._cache_usage = families.cache_usage.labels(model)
        self._cache_queries = families.cache_queries.labels(model)
        self._cache_hits = families.cache_hits.labels(model)
        self._prompt_tokens = families.prompt_tokens.labels(model)
        self._generation_tokens = families.generation_tokens.labels(model)
        self._success = {each.value: families.success.labels(model, each.value) for each in FinishReason}
        self._first_token = families.first_token.labels(model)
        self._inter_token = families.inter_token.labels(model)
        self._queue_time = families.queue_time.labels(model)
        self._prefill_time = families.prefill_time.labels(model)
        self._e2e = families.e2e.labels(model)

    def set_running(self, n: int) -> None:
        """Set how many requests hold a sequence."""
        self._running.set(n)

    def set_waiting(self, n: int) -> None:
        """Set how many requests wait in the queue."""
        self._waiting.set(n)

    def set_kv_cache_usage(self, ratio: float) -> None:
        """Set the share of KV cells in use, 0 to 1."""
        self._cache_usage.set(ratio)

    def prefix_cache(self, queried_tokens: int, hit_tokens: int) -> None:
        """Count one look-up: how many prompt tokens were asked for and how many were found."""
        self._cache_queries.inc(queried_tokens)
        self._cache_hits.inc(hit_tokens)

    def prompt_tokens(self, n: int) -> None:
        """Count prompt tokens of an accepted request, reused ones included."""
        self._prompt_tokens.inc(n)

    def generation_tokens(self, n: int) -> None:
        """Count generated tokens."""
        self._generation_tokens.inc(n)

    def time_to_first_token(self, s: float) -> None:
        """Observe the seconds from acceptance to the first token."""
        self._first_token.observe(s)

    def inter_token_latency(self, s: float) -> None:
        """Observe the seconds between two tokens of one sequence."""
        self._inter_token.observe(s)

    def request_finished(self, finish_reason: str, queue_s: float, prefill_s: float, e2e_s: float) -> None:
        """Count a request that ended well, and observe its times in seconds.

        Args:
            finish_reason: A value of `FinishReason`; anything else is a mistake of the caller (KeyError), so that
                no label can grow without bound.
            queue_s: From acceptance to the first prefill.
            prefill_s: From there to the first token.
            e2e_s: From acceptance to the end.
        """
        self._success[finish_reason].inc()
        self._queue_time.observe(queue_s)
        self._prefill_time.observe(prefill_s)
        self._e2e.observe(e2e_s)
