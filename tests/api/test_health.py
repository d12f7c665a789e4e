"""Health and metrics."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance.core.types import Health
from tests.api.boxes import ScriptedBox, post, wire

pytestmark = pytest.mark.anyio


async def test_ready_is_200_and_not_ready_a_503_with_the_reason(box: ScriptedBox) -> None:
    reply = await box.ask("GET", "/health")
    assert (reply.status, reply.json()) == (200, {"status": "ok"})
    box.health.now = Health(ready=False, reason="Loading tiny:1.")
    reply = await box.ask("GET", "/health")
    assert (reply.status, reply.json()) == (503, {"status": "unavailable", "reason": "Loading tiny:1."})
    assert (await box.ask("GET", "/health/live")).status == 200


async def test_health_answers_while_every_request_waits(box: ScriptedBox) -> None:
    box.models.script = lambda _: [asyncio.Event()]
    async with wire(box) as client:
        await client.send(post("/v1/completions", {"model": "tiny", "prompt": "x"}))
        await box.models.accepted.wait()
        assert (await box.ask("GET", "/health")).status == 200


async def test_metrics_are_readable_for_prometheus(box: ScriptedBox) -> None:
    box.metrics.for_model("tiny:1").prompt_tokens(3)
    await box.ask("GET", "/v1/models/none")
    reply = await box.ask("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }
    assert samples["appliance_prompt_tokens_total", "tiny:1"] == 3
    assert samples["appliance_http_requests_total", "/v1/models/{model}", "404"] == 1
    assert samples["appliance_http_requests_in_progress",] == 1


async def test_head_is_get_without_the_body(box: ScriptedBox) -> None:
    reply = await box.ask("HEAD", "/health")
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["content-length"] == "15"
