from __future__ import annotations

import pytest

from appliance.core.types import FinishReason
from appliance.observe.figures import Snapshot, serving_figures, snapshot, waiting_requests
from appliance.observe.metrics import Metrics


def test_the_figures_of_a_while_are_the_difference_of_two_looks() -> None:
    metrics = Metrics()
    model = metrics.for_model("chat")
    metrics.for_embedder("quiet")
    model.generation_tokens(1000)
    model.time_to_first_token(50.0)
    before = snapshot(metrics)
    model.prompt_tokens(70)
    model.generation_tokens(300)
    for _ in range(20):
        model.time_to_first_token(0.07)
        model.inter_token_latency(0.04)
        model.request_finished(FinishReason.STOP.value, 0.02, 0.05, 3.0)
    model.prefix_cache(70, 35)
    model.set_waiting(3)
    model.set_running(2)
    for status in (200, 200, 429, 500):
        metrics.http_started()
        metrics.http_finished("/v1/chat/completions", status)
    figures = serving_figures(before, snapshot(metrics), 60.0)
    assert (figures["seconds"], figures["requests"], figures["errors"]) == (60.0, 4, {"429": 1, "500": 1})
    chat = figures["models"]["chat"]
    assert (chat["generated_tokens"], chat["prompt_tokens"], chat["tokens_per_second"]) == (300, 70, 5.0)
    assert (chat["waiting"], chat["running"], chat["finished"]) == (3, 2, {"stop": 20})
    assert (chat["prefix_cache_queries"], chat["prefix_cache_hits"]) == (70, 35)
    assert chat["ttft_p50"] == pytest.approx(0.075)
    assert 0.095 <= chat["ttft_p95"] <= 0.1
    assert 0.03 <= chat["itl_p50"] <= 0.05
    assert figures["models"]["quiet"].keys() == {"waiting", "running", "kv_cache"}
    assert waiting_requests(snapshot(metrics)) == 3


def test_a_while_in_which_nothing_happened_has_gauges_only() -> None:
    metrics = Metrics()
    assert waiting_requests(snapshot(metrics)) == 0
    metrics.for_model("chat")
    now = snapshot(metrics)
    assert serving_figures(now, now, 0.0) == {
        "seconds": 0.0,
        "requests": 0,
        "errors": {},
        "models": {"chat": {"running": 0, "waiting": 0, "kv_cache": 0.0}},
    }


def test_a_quantile_above_the_last_bound_is_that_bound() -> None:
    metrics = Metrics()
    model = metrics.for_model("chat")
    before = snapshot(metrics)
    model.time_to_first_token(1000.0)
    assert serving_figures(before, snapshot(metrics), 1.0)["models"]["chat"]["ttft_p50"] == 160.0


def test_models_are_bounded_and_their_names_cut() -> None:
    metrics = Metrics()
    for number in range(60):
        metrics.for_model(f"{number:02} {'x' * 200}")
    figures = serving_figures(Snapshot({}), snapshot(metrics), 1.0)
    assert len(figures["models"]) == 50
    assert max(len(name) for name in figures["models"]) == 128
