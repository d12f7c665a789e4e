"""No text of a request leaves the box: marked ones go through the real server, and every published byte is searched."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import urllib3

from appliance import compose
from appliance.compose import build
from appliance.core.clock import SystemClock
from appliance.core.fleet import ReportedModel, TelemetryBatch
from appliance.core.messaging import Message
from appliance.core.settings import Settings
from appliance.fleet.collect import Collector, Sources
from appliance.messaging.compression import decompress
from appliance.observe.metrics import Metrics
from tests.fleet.telemetry_ends import Wire, device, hub, is_empty, until
from tests.journeys.processes import notify_socket

pytestmark = pytest.mark.anyio
MARK = "Zebrafink-81c4"


async def ask(port: int, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    pool = urllib3.PoolManager(retries=False, timeout=60.0)
    try:
        response = await asyncio.to_thread(pool.request, "POST", f"http://127.0.0.1:{port}{path}", json=body)
        return response.status, response.data
    finally:
        pool.clear()


async def test_no_text_of_a_request_is_in_any_byte_that_is_published(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    monkeypatch.setattr(compose, "Metrics", lambda: metrics)
    stack = AsyncExitStack()
    stack.enter_context(notify_socket(tmp_path))  # or the library that speaks to systemd leaves a socket open
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    settings = Settings(data_dir=tiny_data, port=0, model="tiny", threads=1)
    async with (
        asyncio.timeout(100),
        stack,
        build(settings) as box,
        asyncio.TaskGroup() as tasks,
        AsyncExitStack() as ends,
    ):
        running = tasks.create_task(box.run())
        await box.listening.wait()
        await until(lambda: box.floor.readiness.health().ready, 60.0)
        wire = Wire(tasks)
        wire.ingest, _ = await ends.enter_async_context(hub(tmp_path / "hub.db", wire))
        wire.telemetry = await ends.enter_async_context(device(tmp_path / "telemetry.db", wire, clock=SystemClock()))
        outbox = wire.telemetry._outbox
        sources = Sources(
            health=box.floor.readiness,
            stalled=lambda: box.floor.readiness.stalled,
            metrics=metrics,
            models=lambda: [ReportedModel("tiny", "1", "text", "0" * 64, loaded=True)],
            folder=tiny_data,
            queue_size=settings.queue_size,
        )
        collector = Collector(outbox, sources, SystemClock())
        collector.set_rates({"sample": 1.0, "metric": 1.0, "health": 1.0})
        collecting = tasks.create_task(collector.run())
        await wire.telemetry.connected()
        texts = []
        messages = [{"role": "user", "content": f"{MARK} is my secret"}]
        asked = {"model": "tiny", "messages": messages, "max_tokens": 8, "user": MARK, "metadata": {"x": MARK}}
        for path, body in (
            ("/v1/chat/completions", asked),
            ("/v1/completions", {"model": "tiny", "prompt": MARK, "max_tokens": 8, "echo": True}),
            ("/v1/chat/completions", {**asked, "model": MARK}),
            ("/v1/chat/completions", {**asked, "temperature": MARK}),
            (f"/v1/{MARK}", asked),
            ("/v1/embeddings", {"model": "tiny", "input": MARK}),
        ):
            status, answer = await ask(box.port, path, body)
            texts.append((status, answer))
        answered = [msgspec.json.decode(data)["choices"][0] for status, data in texts[:2] if status == 200]
        assert len(answered) == 2
        seen = len(wire.seen)
        await until(lambda: len(wire.seen) > seen + 6, 20.0)
        collecting.cancel()
        await until(lambda: is_empty(outbox), 20.0)
        await ends.aclose()
        box.stop()
        await running
    answers = [each["message"]["content"] if "message" in each else each["text"] for each in answered]
    published = b"".join(_bytes(each) for each in wire.seen)
    kinds = {row.kind for each in wire.seen for row in _batch(each).rows}
    assert kinds >= {"health", "serving", "resources", "models", "started"}
    assert b"generated_tokens" in published
    assert b"404" in published
    assert MARK.encode() not in published
    assert b"secret" not in published
    for answer in answers:
        assert len(answer) < 5 or answer.encode() not in published


def _batch(message: Message) -> TelemetryBatch:
    return msgspec.json.decode(decompress(message.payload), type=TelemetryBatch)


def _bytes(message: Message) -> bytes:
    return message.topic.encode() + message.payload + (message.correlation or b"") + decompress(message.payload)
