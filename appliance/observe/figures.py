"""How the box served over a while: the difference of its Prometheus metrics between two looks at them.

Only the metrics that are named here are looked at, and of those only the labels `model`, `finish_reason` and `status`:
what a client sent is in none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from appliance.observe.metrics import PREFIX, Metrics

_COUNTERS = {
    "generation_tokens_total": "generated_tokens",
    "prompt_tokens_total": "prompt_tokens",
    "prefix_cache_queries_total": "prefix_cache_queries",
    "prefix_cache_hits_total": "prefix_cache_hits",
}
_GAUGES = {"num_requests_running": "running", "num_requests_waiting": "waiting", "kv_cache_usage_ratio": "kv_cache"}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "ttft",
    "inter_token_latency_seconds": "itl",
    "request_queue_time_seconds": "queue",
    "e2e_request_latency_seconds": "e2e",
}
_MOST_MODELS = 50
_ERRORS_FROM = 400

_Buckets = dict[tuple[str, str], list[tuple[float, float]]]
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every sample of the process's metrics at one moment, by name and labels."""

    samples: Mapping[tuple[str, Labels], float]


def snapshot(metrics: Metrics) -> Snapshot:
    """Look at the metrics; takes milliseconds."""
    return Snapshot(
        {
            (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): float(sample.value)
            for family in metrics.registry.collect()
            for sample in family.samples
        }
    )


def serving_figures(before: Snapshot, after: Snapshot, seconds: float) -> dict[str, Any]:
    """Return how each model served between two looks.

    Returns:
        `seconds`; `requests` and `errors` by HTTP status; `models` by name: tokens, `tokens_per_second`, requests by
        finish reason, what is running and waiting, and p50 and p95 in seconds of time to first token (`ttft`), between
        tokens (`itl`), in the queue and altogether. A model that did nothing has its gauges only.
    """
    models: dict[str, dict[str, Any]] = {}
    statuses: dict[str, int] = {}
    buckets: _Buckets = {}
    for (name, labels), value in after.samples.items():
        named = dict(labels)
        grown = max(0.0, value - before.samples.get((name, labels), 0.0))
        if name == "http_requests_total" and grown:
            status = named.get("status", "")
            statuses[status] = statuses.get(status, 0) + int(grown)
        model = named.get("model")
        if model is None or (model not in models and len(models) >= _MOST_MODELS):
            continue
        if name.endswith("_bucket"):
            _note_bucket(name.removesuffix("_bucket"), named, grown, buckets)
        _note(models.setdefault(model[:128], {}), name, named.get("finish_reason", ""), value, grown)
    for (model, key), bounds in buckets.items():
        for share in (0.5, 0.95):
            quantile = _quantile(sorted(bounds), share)
            if quantile is not None:
                models[model][f"{key}_p{share * 100:.0f}"] = quantile
    for each in models.values():
        if "generated_tokens" in each and seconds > 0:
            each["tokens_per_second"] = round(each["generated_tokens"] / seconds, 3)
    errors = {status: count for status, count in statuses.items() if status.isdecimal() and int(status) >= _ERRORS_FROM}
    return {"seconds": round(seconds, 3), "requests": sum(statuses.values()), "errors": errors, "models": models}


def waiting_requests(after: Snapshot) -> int:
    """Return the requests of the longest queue of a model."""
    return int(max((v for (name, _), v in after.samples.items() if name == "num_requests_waiting"), default=0.0))


def _note(figures: dict[str, Any], name: str, finish_reason: str, value: float, grown: float) -> None:
    if name in _GAUGES:
        figures[_GAUGES[name]] = round(value, 4)
    elif name in _COUNTERS and grown:
        figures[_COUNTERS[name]] = int(grown)
    elif name == "request_success_total" and grown:
        figures.setdefault("finished", {})[finish_reason] = int(grown)


def _note_bucket(name: str, labels: Mapping[str, str], grown: float, buckets: _Buckets) -> None:
    if name in _HISTOGRAMS:
        key = (labels["model"][:128], _HISTOGRAMS[name])
        buckets.setdefault(key, []).append((float(labels["le"].replace("+Inf", "inf")), grown))


def _quantile(cumulative: list[tuple[float, float]], share: float) -> float | None:
    """Return a quantile of a histogram, straight within a bucket, as Prometheus's `histogram_quantile` does."""
    total = cumulative[-1][1] if cumulative else 0.0
    if total <= 0:
        return None
    rank, lower, below = share * total, 0.0, 0.0
    for upper, count in cumulative:
        if count >= rank:
            if math.isinf(upper):
                return lower
            return round(lower + (upper - lower) * (rank - below) / (count - below), 4)
        lower, below = upper, count
    return lower
