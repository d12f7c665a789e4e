from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from appliance.core.fleet import ReportedModel, Stream
from appliance.core.messaging import Message
from appliance.core.types import Health
from appliance.fleet import collect
from appliance.fleet.collect import DEFAULT_RATES, Collector, Sources
from appliance.observe.metrics import Metrics
from appliance.observe.resources import Disk, Memory
from appliance.store.outbox import Outbox
from appliance.store.outbox_rows import content
from tests.observe.test_sensors import ORIN, recorded
from tests.store.clocks import SetClock

pytestmark = pytest.mark.anyio


@dataclass
class Box:
    """What a collector looks at, all of it settable."""

    root: Path
    ready: Health = Health(ready=True)  # noqa: RUF009
    stuck: list[str] = field(default_factory=list)
    models: list[ReportedModel] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    hub: float | None = None
    certificate: float | None = None

    def health(self) -> Health:
        return self.ready

    def sources(self) -> Sources:
        return Sources(
            health=self,
            stalled=lambda: self.stuck,
            metrics=self.metrics,
            models=lambda: self.models,
            folder=self.root,
            queue_size=10,
            certificate_ends=lambda: self.certificate,
            hub_unix=lambda: self.hub,
            root=self.root,
        )


@dataclass
class Telling:
    box: Box
    clock: SetClock
    outbox: Outbox
    collector: Collector

    async def look(self, seconds: float, step: float = 10.0) -> None:
        for _ in range(int(seconds / step)):
            self.clock.pass_(step)
            await self.collector.collect(self.clock.monotonic())

    def rows(self, stream: Stream) -> list[tuple[str, dict[str, Any]]]:
        found = self.outbox.rows_after(stream, (0, 0), (2**60, 0), most=10_000, most_bytes=10**9)
        return [(row.kind, content(row)) for row in found]

    def alarms(self) -> list[tuple[str, str]]:
        return [(kind, str(body.get("name", ""))) for kind, body in self.rows("alarm")]


@asynccontextmanager
async def telling(folder: Path) -> AsyncIterator[Telling]:
    root = recorded(folder / "root", ORIN)
    clock = SetClock(1_800_000_000.0)
    outbox = Outbox(folder / "data" / "telemetry.db", clock)
    box = Box(root)
    try:
        yield Telling(box, clock, outbox, Collector(outbox, box.sources(), clock))
    finally:
        await outbox.close()


async def test_health_figures_resources_and_models_are_told_at_their_rates(tmp_path: Path) -> None:
    async with telling(tmp_path) as each:
        each.box.models = [ReportedModel("chat", "3", "text", "0" * 64, loaded=True, status="active")]
        await each.collector.collect(each.clock.monotonic())
        each.box.metrics.for_model("chat").generation_tokens(120)
        await each.look(120)
        healths = each.rows("health")
        assert [kind for kind, _ in healths] == ["health"] * 3
        assert healths[-1][1]["ready"] is True
        assert healths[-1][1]["uptime_s"] == 120.0
        metrics = each.rows("metric")
        assert [kind for kind, _ in metrics].count("serving") == 3
        assert [kind for kind, _ in metrics].count("models") == 1
        serving = [body for kind, body in metrics if kind == "serving"][1]
        assert serving["seconds"] == 60.0
        assert serving["models"]["chat"]["tokens_per_second"] == 2.0
        resources = next(body for kind, body in metrics if kind == "resources")
        assert resources["temperatures"] == {"cpu-thermal": 48.3, "gpu-thermal": 46.9}
        assert resources["watts"] == {"VDD_CPU_GPU_CV": 1.34, "VDD_IN": 6.57}
        assert resources["gpu"] == 0.333
        assert resources["memory"]["total"] > 0
        models = next(body for kind, body in metrics if kind == "models")
        assert (models["count"], models["models"][0]["name"], models["models"][0]["status"]) == (1, "chat", "active")
        assert each.rows("sample") == []


async def test_models_are_told_when_they_change_and_once_a_day(tmp_path: Path) -> None:
    async with telling(tmp_path) as each:
        assert each.collector.set_rates({"metric": 3600.0, "health": 0}) == {}
        await each.collector.collect(each.clock.monotonic())
        each.box.models = [ReportedModel("chat", "3", "text", "0" * 64, loaded=True)] * 500
        await each.look(3600.0, 3600.0)
        await each.look(26 * 3600.0, 3600.0)
        told = [body for kind, body in each.rows("metric") if kind == "models"]
        assert [body["count"] for body in told] == [0, 500, 500]
        assert len(told[1]["models"]) == 100


async def test_a_change_of_readiness_is_told_at_once(tmp_path: Path) -> None:
    async with telling(tmp_path) as each:
        await each.collector.collect(each.clock.monotonic())
        each.box.ready = Health(ready=False, reason="The model is loading.")
        await each.look(10)
        assert [body["reason"] for _, body in each.rows("health")] == ["", "The model is loading."]


async def test_rates_that_make_no_sense_are_refused_by_name(tmp_path: Path) -> None:
    async with telling(tmp_path) as each:
        wrong: dict[str, Any] = {"alarm": 5.0, "metric": -1, "health": float("nan"), "sample": 0.5, "x": 1}
        refused = each.collector.set_rates(wrong)
        assert refused.keys() == wrong.keys()
        assert "neither 0 nor from 1 to 86400 seconds" in refused["sample"]
        assert "no such rate" in refused["alarm"]
        assert each.collector.rates == DEFAULT_RATES
        assert each.collector.set_rates({"sample": True, "metric": "fast"}).keys() == {"sample", "metric"}  # type: ignore[dict-item]
        assert each.collector.set_rates({"sample": 10, "metric": 0}) == {}
        await each.look(60)
        assert len(each.rows("sample")) == 6
        assert each.rows("metric") == []
        assert each.collector.set_rates({}) == {}
        assert each.collector.rates == DEFAULT_RATES


async def test_alarms_are_told_with_all_that_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with telling(tmp_path) as each:
        free = Disk(100, 1)
        monkeypatch.setattr(collect, "disk", lambda _: free)
        each.box.stuck = ["chat"]
        await each.look(60)
        assert each.alarms() == [("raised", "engine_stalled"), ("raised", "disk")]
        _, body = each.rows("alarm")[1]
        assert body["open"].keys() == {"engine_stalled", "disk"}
        assert body["severity"] == "critical"
        assert body["open"]["engine_stalled"]["detail"] == "chat"
        free = Disk(100, 50)
        each.box.stuck = []
        await each.look(120)
        assert each.alarms()[2:] == [("cleared", "engine_stalled"), ("cleared", "disk")]
        assert each.rows("alarm")[-1][1]["open"] == {}


async def test_every_alarm_has_a_value_that_raises_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with telling(tmp_path) as each:
        await each.look(10)

        def unreadable(_: Path) -> Disk:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(collect, "disk", unreadable)
        monkeypatch.setattr(collect, "memory", lambda _: Memory(100, 1))
        recorded(each.box.root, {"sys/class/thermal/thermal_zone0/temp": "97000\n"})
        each.box.stuck = ["chat"]
        each.box.metrics.for_model("chat").set_waiting(9)
        each.outbox.lost += 5
        each.outbox.failing = "The disk is full."
        each.outbox.moved_aside = "It is damaged."
        each.box.hub = each.clock.unix() + 1000.0
        each.box.certificate = each.clock.unix() + 86_400.0
        await each.look(120)
        assert {name for _, name in each.alarms()} >= {rule.name for rule in collect.RULES} - {
            "clock",
            "outbox_failing",
        }
        assert "97 °C" in each.collector._book.open["temperature"].detail


async def test_a_wrong_clock_is_an_alarm_until_it_is_right(tmp_path: Path) -> None:
    async with telling(tmp_path) as each:
        for wall in (0.0, 2_200_000_000.0):
            each.clock.wall = wall
            for _ in range(6):
                each.box.hub = 1_800_000_000.0
                await each.look(10)
            assert each.alarms()[-1] == ("raised", "clock")
            each.clock.wall = 1_800_000_000.0
            for _ in range(30):
                each.box.hub = each.clock.unix() + 10.0
                await each.look(10)
            assert each.alarms()[-1] == ("cleared", "clock")


async def test_lost_rows_are_an_alarm_for_an_hour(tmp_path: Path) -> None:
    async with telling(tmp_path) as each:
        each.collector.set_rates({"health": 0, "metric": 0})
        await each.look(100)
        each.outbox.lost += 7
        await each.look(3590)
        assert each.alarms() == [("raised", "outbox_lossy")]
        assert each.rows("alarm")[0][1]["value"] == 7.0
        await each.look(30)
        assert each.alarms()[-1] == ("cleared", "outbox_lossy")


async def test_an_event_is_an_alarm_and_is_bounded(tmp_path: Path) -> None:
    async with telling(tmp_path) as each:
        await each.collector.note("cloned_identity", {"epoch": 7, "x" * 1000: "y" * 100_000})
        ((kind, body),) = each.rows("alarm")
        assert (kind, body["name"], body["severity"]) == ("raised", "cloned_identity", "critical")
        assert len(body["detail"]) == 500


async def test_it_runs_reads_nothing_and_follows_a_change_of_rates(tmp_path: Path) -> None:
    async with telling(tmp_path) as each:
        assert each.collector.kinds == frozenset()
        await each.collector.connected()
        await each.collector.handle("ack", Message("x", b""))
        task = asyncio.ensure_future(each.collector.run())
        async with asyncio.timeout(10):
            while not each.rows("health"):  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.01)
            assert each.rows("alarm")[0] == ("started", {"open": {}})
            each.collector.set_rates({"sample": 1.0})
            while not each.rows("sample"):  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.01)
        task.cancel()


async def test_a_row_too_large_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with telling(tmp_path) as each:
        each.box.models = [ReportedModel("n" * 300, "v", "text", "0" * 64, loaded=False)] * 100
        await each.collector.collect(each.clock.monotonic())
        assert [kind for kind, _ in each.rows("metric")] == ["serving", "resources"]
        assert "left out" in caplog.text
        assert replace(each.box.sources(), queue_size=0).queue_size == 0
