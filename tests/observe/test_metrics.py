"""What Prometheus reads from the metrics."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from appliance.observe.metrics import CONTENT_TYPE, TOKEN_BUCKETS_S, Metrics

MODEL = "tiny:1"


def parse(metrics: Metrics) -> dict[str, Metric]:
    return {each.name: each for each in text_string_to_metric_families(metrics.render().decode())}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_what_two_engines_of_one_model_show_is_added_up() -> None:
    metrics = Metrics()
    text, embedding = metrics.for_model("m"), metrics.for_embedder("m")
    assert metrics.for_embedder("m") is embedding
    assert text is not embedding
    text.set_running(3)
    embedding.set_running(2)
    text.set_running(1)
    embedding.set_waiting(4)
    text.set_waiting(0)
    embedding.prompt_tokens(5)
    text.prompt_tokens(6)
    told = metrics.render().decode()
    assert 'appliance_num_requests_running{model="m"} 3.0' in told
    assert 'appliance_num_requests_waiting{model="m"} 4.0' in told
    assert 'appliance_prompt_tokens_total{model="m"} 11.0' in told


def test_every_series_of_a_model_exists_at_zero_once_the_model_is_named() -> None:
    metrics = Metrics()
    metrics.for_model(MODEL)
    samples = {
        sample.name: sample.value
        for family in parse(metrics).values()
        for sample in family.samples
        if sample.labels.get("model") == MODEL
    }
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_ratio",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "request_queue_time_seconds_count",
        "request_prefill_time_seconds_count",
        "e2e_request_latency_seconds_count",
    ):
        assert samples[f"appliance_{name}"] == 0, name
    assert not [name for name in samples if name.endswith("_created")]
    assert value(metrics, "appliance_request_success_total", model=MODEL, finish_reason="stop") == 0
    assert value(metrics, "appliance_request_success_total", model=MODEL, finish_reason="length") == 0


def test_what_a_session_and_the_embedding_cache_show_is_added_up() -> None:
    metrics = Metrics()
    tensors, embedding = metrics.for_tensors("m"), metrics.for_embedder("m")
    tensors.set_running(2)
    embedding.set_waiting(4)
    embedding.prompt_tokens(5)
    tensors.prompt_tokens(6)
    assert value(metrics, "appliance_num_requests_running", model="m") == 2
    assert value(metrics, "appliance_num_requests_waiting", model="m") == 4
    assert value(metrics, "appliance_prompt_tokens_total", model="m") == 11


def test_a_tensor_model_has_its_own_series_and_no_key_values() -> None:
    metrics = Metrics()
    tensors = metrics.for_tensors(MODEL)
    assert metrics.for_tensors(MODEL) is tensors
    for name in ("num_requests_running", "num_requests_waiting", "batch_rows_count", "e2e_request_latency_seconds_sum"):
        assert value(metrics, f"appliance_{name}", model=MODEL) == 0, name
    assert b"appliance_kv_cache_usage_ratio{" not in metrics.render()
    tensors.set_running(2)
    tensors.set_waiting(3)
    tensors.batch(5)
    tensors.request_finished(0.5, 0.75)
    assert value(metrics, "appliance_num_requests_running", model=MODEL) == 2
    assert value(metrics, "appliance_num_requests_waiting", model=MODEL) == 3
    assert value(metrics, "appliance_batch_rows_sum", model=MODEL) == 5
    assert value(metrics, "appliance_batch_rows_bucket", model=MODEL, le="4.0") == 0
    assert value(metrics, "appliance_request_success_total", model=MODEL, finish_reason="stop") == 1
    assert value(metrics, "appliance_request_queue_time_seconds_sum", model=MODEL) == 0.5
    assert value(metrics, "appliance_e2e_request_latency_seconds_sum", model=MODEL) == 0.75


def test_calls_move_their_own_series_and_no_other_models() -> None:
    metrics = Metrics()
    model, other = metrics.for_model(MODEL), metrics.for_model("other:1")
    model.set_running(3)
    model.set_waiting(2)
    model.set_kv_cache_usage(0.25)
    model.prefix_cache(100, 60)
    model.prompt_tokens(100)
    model.generation_tokens(7)
    model.time_to_first_token(0.2)
    model.inter_token_latency(0.02)
    model.request_finished("length", 0.1, 0.1, 1.5)
    for name, expected in {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_ratio": 0.25,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 60,
        "prompt_tokens_total": 100,
        "generation_tokens_total": 7,
        "time_to_first_token_seconds_sum": 0.2,
        "inter_token_latency_seconds_sum": 0.02,
        "request_queue_time_seconds_sum": 0.1,
        "request_prefill_time_seconds_sum": 0.1,
        "e2e_request_latency_seconds_sum": 1.5,
    }.items():
        assert value(metrics, f"appliance_{name}", model=MODEL) == pytest.approx(expected), name
        assert value(metrics, f"appliance_{name}", model="other:1") == 0, name
    assert value(metrics, "appliance_request_success_total", model=MODEL, finish_reason="length") == 1
    assert metrics.for_model("other:1") is other


@given(st.lists(st.sampled_from(TOKEN_BUCKETS_S) | st.floats(0, 20)))
def test_the_time_between_tokens_reads_as_a_histogram_of_the_library(observed: list[float]) -> None:
    metrics = Metrics()
    ours = metrics.for_model(MODEL)
    metrics.for_model("quiet:1")
    name = "appliance_inter_token_latency_seconds"
    registry = CollectorRegistry()
    theirs = Histogram(name, "Time between tokens", ["model"], buckets=TOKEN_BUCKETS_S, registry=registry)
    for model in (MODEL, "quiet:1"):
        theirs.labels(model)
    for each in observed:
        ours.inter_token_latency(each)
        theirs.labels(MODEL).observe(each)
    told = [line for line in metrics.render().decode().splitlines() if name in line]
    assert sorted(told) == sorted(generate_latest(registry).decode().splitlines())


def test_an_unknown_finish_reason_makes_no_new_series() -> None:
    metrics = Metrics()
    model = metrics.for_model(MODEL)
    before = metrics.render().count(b"finish_reason=")
    with pytest.raises(KeyError):
        model.request_finished("client said so", 0, 0, 0)
    assert metrics.render().count(b"finish_reason=") == before
    assert value(metrics, "appliance_e2e_request_latency_seconds_count", model=MODEL) == 0


def test_http_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics()
    metrics.http_started()
    metrics.http_started()
    assert value(metrics, "appliance_http_requests_in_progress") == 2
    metrics.http_finished("/v1/models/{model}", 404)
    assert value(metrics, "appliance_http_requests_in_progress") == 1
    assert value(metrics, "appliance_http_requests_total", route="/v1/models/{model}", status="404") == 1


def test_two_registries_do_not_share_series_and_each_has_the_process_figures() -> None:
    first, second = Metrics(), Metrics()
    first.for_model(MODEL).prompt_tokens(5)
    assert value(second, "appliance_prompt_tokens_total", model=MODEL) is None
    for metrics in (first, second):
        assert (value(metrics, "process_resident_memory_bytes") or 0) > 1_000_000
    assert "version=0.0.4" in CONTENT_TYPE
