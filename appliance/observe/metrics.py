"""Prometheus metrics: counters and histograms of the models and of the HTTP door.

Names follow the field (`num_requests_running`, `time_to_first_token_seconds` …) with our prefix, base units and the
one label `model`; nothing that a client can invent becomes a label. Every series of a model exists at 0 from the
moment `for_model` names it, so that a rate over a quiet box is 0 and not absent.

What changes with each token is kept in plain numbers and put into the library's form when somebody asks: its own
counters and histograms take locks, which at each token of each stream costs more than the token's way to the client.
Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar, get_args, get_type_hints

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from appliance.core.batches import BatchStatus
from appliance.core.sessions import ResponseStatus
from appliance.core.tools import ToolResult
from appliance.core.types import FinishReason
from appliance.observe.fleet_metrics import FleetMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What `Metrics.render` writes."""

PREFIX = "appliance_"

TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds for the time between two tokens."""

WAIT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
"""Upper bounds for what a client waits before its first token."""

REQUEST_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
"""Upper bounds for a whole request."""

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds for the rows of a batch."""

_Series = TypeVar("_Series", "TensorMetrics", "ModelMetrics")


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
        self._models: dict[str, dict[str, TensorMetrics | ModelMetrics]] = {}
        self._http_requests = Counter(
            f"{PREFIX}http_requests", "HTTP requests answered", ["route", "status"], registry=self.registry
        )
        self.responses = ResponseMetrics(self.registry)
        self.batches = BatchMetrics(self.registry)
        self.fleet = FleetMetrics(self.registry)
        self.versions = VersionMetrics(self.registry)
        self._http_running = Gauge(
            f"{PREFIX}http_requests_in_progress", "HTTP requests being answered", registry=self.registry
        )

    def render(self) -> bytes:
        """Return every series in the text format that `CONTENT_TYPE` names."""
        return generate_latest(self.registry)

    def for_model(self, name: str) -> ModelMetrics:
        """Return the series of one model, made at 0 on the first call for this name."""
        return self._series(name, "text", ModelMetrics)

    def for_embedder(self, name: str) -> ModelMetrics:
        """Return the same series for a model's embeddings: what its two engines count is added up."""
        return self._series(name, "embedding", ModelMetrics)

    def for_tensors(self, name: str) -> TensorMetrics:
        """Return the series of a model that turns tensors into tensors, made at 0 on the first call for this name."""
        return self._series(name, "tensors", TensorMetrics)

    def _series(self, name: str, work: str, kind: type[_Series]) -> _Series:
        if name not in self._models:
            self._models[name] = {}
            self._families.show_load(name, self._models[name].values())
        engines = self._models[name]
        if work not in engines:
            engines[work] = kind(self._families, name)
            if kind is ModelMetrics:
                self._families.show_cache_usage(name, engines.values())
        series = engines[work]
        assert isinstance(series, kind), "each work has its own kind of series"
        return series

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


class ResponseMetrics:
    """The series of `/v1/responses`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Make every series at 0; `Metrics` has the one of the process."""
        self._ended = Counter(f"{PREFIX}responses", "Responses that ended", ["status"], registry=registry)
        self._called = Counter(f"{PREFIX}tool_calls", "Calls of built-in tools", ["outcome"], registry=registry)
        for status in get_args(ResponseStatus)[2:]:
            self._ended.labels(status)
        for kind in get_args(get_type_hints(ToolResult)["kind"]):
            self._called.labels(kind)

    def response_ended(self, status: ResponseStatus) -> None:
        """Count a response that ended."""
        self._ended.labels(status).inc()

    def tool_called(self, outcome: str) -> None:
        """Count a call of a built-in tool by what became of it: a `kind` of `ToolResult`."""
        self._called.labels(outcome).inc()


class BatchMetrics:
    """The series of `/v1/batches`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Make every series at 0; `Metrics` has the one of the process."""
        self._ended = Counter(f"{PREFIX}batches", "Batches that ended", ["status"], registry=registry)
        self._lines = Counter(f"{PREFIX}batch_lines", "Lines of batches answered", ["outcome"], registry=registry)
        for status in ("completed", "failed", "expired", "cancelled"):
            self._ended.labels(status)
        for outcome in ("completed", "failed"):
            self._lines.labels(outcome)

    def batch_ended(self, status: BatchStatus) -> None:
        """Count a batch that ended."""
        self._ended.labels(status).inc()

    def line_answered(self, *, completed: bool) -> None:
        """Count a line that has its answer."""
        self._lines.labels("completed" if completed else "failed").inc()


class VersionMetrics:
    """The series of models' versions. Names and versions are those of registered models."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Start without any; `Metrics` has the one of the process."""
        self._active = Gauge(f"{PREFIX}model_version_active", "What answers", ["model", "version"], registry=registry)
        self._trials = Counter(f"{PREFIX}model_trials", "Trials that began", ["model"], registry=registry)
        self._rollbacks = Counter(f"{PREFIX}model_rollbacks", "Versions rolled back", ["model"], registry=registry)
        self._shown: dict[str, str] = {}

    def show(self, active: Mapping[str, str]) -> None:
        """Show the full names of the versions that answer, by short name."""
        for name, full_name in self._shown.items():
            if active.get(name) != full_name:
                self._active.remove(name, full_name.rpartition(":")[2])
        for name, full_name in active.items():
            self._active.labels(name, full_name.rpartition(":")[2]).set(1)
            self._trials.labels(name)
            self._rollbacks.labels(name)
        self._shown = dict(active)

    def trial_began(self, name: str) -> None:
        """Count a trial."""
        self._trials.labels(name).inc()

    def rolled_back(self, name: str) -> None:
        """Count a version that was given up."""
        self._rollbacks.labels(name).inc()


class TokenSeries:
    """What changes with each token of one model.

    Attributes:
        tokens: Generated tokens.
    """

    def __init__(self, buckets: Sequence[float]) -> None:
        """Start at 0; `buckets` are upper bounds, without infinity."""
        self.tokens = 0
        self._buckets = buckets
        self._observed = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, s: float) -> None:
        """Count the seconds between two tokens."""
        self._observed[bisect_left(self._buckets, s)] += 1
        self._sum += s

    def add_to(self, tokens: Metric, latency: HistogramMetricFamily, model: str) -> None:
        """Put the figures into the library's form."""
        tokens.add_sample(f"{tokens.name}_total", {"model": model}, self.tokens)
        bounds = [floatToGoString(each) for each in (*self._buckets, math.inf)]  # type: ignore[no-untyped-call]
        latency.add_metric([model], list(zip(bounds, accumulate(self._observed), strict=True)), self._sum)


class _TokenFamilies(Collector):
    """The metrics that change with each token."""

    def __init__(self) -> None:
        self._series: dict[str, TokenSeries] = {}

    def labels(self, model: str) -> TokenSeries:
        return self._series.setdefault(model, TokenSeries(TOKEN_BUCKETS_S))

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily(f"{PREFIX}generation_tokens", "Generated tokens", labels=["model"])
        latency = HistogramMetricFamily(f"{PREFIX}inter_token_latency_seconds", "Time between tokens", labels=["model"])
        for model, series in self._series.items():
            series.add_to(tokens, latency, model)
        return (tokens, latency)


class _ModelFamilies:
    """The metrics that have a series for each model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(stem: str, meaning: str, *labels: str) -> Counter:
            return Counter(PREFIX + stem, meaning, ["model", *labels], registry=registry)

        def gauge(stem: str, meaning: str) -> Gauge:
            return Gauge(PREFIX + stem, meaning, ["model"], registry=registry)

        def histogram(stem: str, meaning: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(PREFIX + stem, meaning, ["model"], buckets=buckets, registry=registry)

        self.running = gauge("num_requests_running", "Requests that hold a sequence")
        self.waiting = gauge("num_requests_waiting", "Requests in the queue")
        self.cache_usage = gauge("kv_cache_usage_ratio", "Share of the KV cells in use, 0 to 1")
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.embedding_cache_queries = counter("embedding_cache_queries", "Inputs looked up in the embedding cache")
        self.embedding_cache_hits = counter("embedding_cache_hits", "Inputs found in the embedding cache")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Guessed tokens that were checked")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right")
        self.success = counter("request_success", "Finished requests", "finish_reason")
        self.first_token = histogram("time_to_first_token_seconds", "Time to first token", WAIT_BUCKETS_S)
        self.queue_time = histogram("request_queue_time_seconds", "Time in the queue", WAIT_BUCKETS_S)
        self.prefill_time = histogram("request_prefill_time_seconds", "Time of the prefill", WAIT_BUCKETS_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Time from arrival to end", REQUEST_BUCKETS_S)
        self.batch_rows = histogram("batch_rows", "Rows of a batch of a tensor model", BATCH_BUCKETS)
        self.of_tokens = _TokenFamilies()
        registry.register(self.of_tokens)

    def show_load(self, model: str, engines: Collection[_Load]) -> None:
        """Let the gauges of a model show the requests that its engines have together, whenever they are read."""
        self.running.labels(model).set_function(lambda: sum(each.running for each in engines))
        self.waiting.labels(model).set_function(lambda: sum(each.waiting for each in engines))

    def show_cache_usage(self, model: str, engines: Collection[_Load]) -> None:
        """The same for the KV cells."""
        self.cache_usage.labels(model).set_function(lambda: sum(each.cache_usage for each in engines))


class _Load:
    """How many requests an engine has.

    Attributes:
        running: Those that are worked on.
        waiting: Those in its queue.
        cache_usage: Share of its KV cells in use, 0 to 1.
    """

    running = waiting = 0
    cache_usage = 0.0

    def set_running(self, n: int) -> None:
        """Set how many requests are worked on."""
        self.running = n

    def set_waiting(self, n: int) -> None:
        """Set how many requests wait in the queue."""
        self.waiting = n


class TensorMetrics(_Load):
    """The series of a model that turns tensors into tensors. Calls take microseconds and come from the event loop."""

    def __init__(self, families: _ModelFamilies, model: str) -> None:
        """Make every series at 0; use `Metrics.for_tensors`."""
        self._success = families.success.labels(model, FinishReason.STOP.value)
        self._queue_time = families.queue_time.labels(model)
        self._e2e = families.e2e.labels(model)
        self._batch_rows = families.batch_rows.labels(model)
        self._prompt_tokens = families.prompt_tokens.labels(model)

    def prompt_tokens(self, n: int) -> None:
        """Count tokens of texts that were evaluated."""
        self._prompt_tokens.inc(n)

    def batch(self, rows: int) -> None:
        """Observe a batch that was evaluated."""
        self._batch_rows.observe(rows)

    def request_finished(self, queue_s: float, e2e_s: float) -> None:
        """Count a request that ended well, and observe its seconds in the queue and altogether."""
        self._success.inc()
        self._queue_time.observe(queue_s)
        self._e2e.observe(e2e_s)


class ModelMetrics(_Load):
    """The series of one engine of a model. Calls take microseconds and come from the event loop, as the readers do."""

    def __init__(self, families: _ModelFamilies, model: str) -> None:
        """Make every series at 0; use `Metrics.for_model`."""
        self._cache_queries = families.cache_queries.labels(model)
        self._cache_hits = families.cache_hits.labels(model)
        self._embedding_cache_queries = families.embedding_cache_queries.labels(model)
        self._embedding_cache_hits = families.embedding_cache_hits.labels(model)
        self._prompt_tokens = families.prompt_tokens.labels(model)
        self._of_tokens = families.of_tokens.labels(model)
        self._draft_tokens = families.draft_tokens.labels(model)
        self._accepted_tokens = families.accepted_tokens.labels(model)
        self._success = {each.value: families.success.labels(model, each.value) for each in FinishReason}
        self._first_token = families.first_token.labels(model)
        self._queue_time = families.queue_time.labels(model)
        self._prefill_time = families.prefill_time.labels(model)
        self._e2e = families.e2e.labels(model)

    def set_kv_cache_usage(self, ratio: float) -> None:
        """Set the share of KV cells in use, 0 to 1."""
        self.cache_usage = ratio

    def prefix_cache(self, queried_tokens: int, hit_tokens: int) -> None:
        """Count one look-up: how many prompt tokens were asked for and how many were found."""
        self._cache_queries.inc(queried_tokens)
        self._cache_hits.inc(hit_tokens)

    def embedding_cache(self, queried_inputs: int, hit_inputs: int) -> None:
        """Count one look-up: how many inputs were asked for and how many were found."""
        self._embedding_cache_queries.inc(queried_inputs)
        self._embedding_cache_hits.inc(hit_inputs)

    def prompt_tokens(self, n: int) -> None:
        """Count prompt tokens of an accepted request, reused ones included."""
        self._prompt_tokens.inc(n)

    def generation_tokens(self, n: int) -> None:
        """Count generated tokens."""
        self._of_tokens.tokens += n

    def speculation(self, draft_tokens: int, accepted_tokens: int) -> None:
        """Count guessed tokens that were checked, and how many of them were right."""
        self._draft_tokens.inc(draft_tokens)
        self._accepted_tokens.inc(accepted_tokens)

    def time_to_first_token(self, s: float) -> None:
        """Observe the seconds from acceptance to the first token."""
        self._first_token.observe(s)

    def inter_token_latency(self, s: float) -> None:
        """Observe the seconds between two tokens of one sequence."""
        self._of_tokens.observe(s)

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
