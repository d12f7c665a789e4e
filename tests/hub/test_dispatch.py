"""Who reads which message, and what becomes of those that nobody reads."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import StorageError, UnreadableDatabaseError
from appliance.core.fleet import LARGEST_DOCUMENT_BYTES, UpKind
from appliance.core.messaging import Message
from appliance.hub import mqtt
from appliance.hub.dispatch import DEVICES_REMEMBERED, LOG_EVERY_S, Complaints, Dispatcher
from appliance.hub.mqtt import HubLink
from appliance.observe.hub_metrics import HubMetrics
from tests.fleet.broker import Broker, Peer
from tests.hub.hubs import born, hub_settings, running_hub, state_message, until

pytestmark = pytest.mark.anyio


class Reader:
    def __init__(self, *kinds: UpKind) -> None:
        self.kinds = frozenset(kinds)
        self.read: list[tuple[str, str, str]] = []

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:
        self.read.append((device, kind, rest))

    async def run(self) -> None:
        """Do nothing."""


class HandClock(SystemClock):
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def dispatcher(*readers: Reader, clock: HandClock | None = None) -> tuple[Dispatcher, HubMetrics]:
    metrics, clock = HubMetrics(), clock or HandClock()
    return Dispatcher(readers, Complaints(clock, metrics), metrics, clock), metrics


async def test_each_topic_has_one_reader_and_the_device_is_told_by_the_topic() -> None:
    states, jobs = Reader("state", "rep"), Reader("job")
    door, _ = dispatcher(states, jobs)
    await door.receive(Message("ea/1/up/box-1/state", b"{}"))
    await door.receive(Message("ea/1/up/box-2/job/job-7", b"{}"))
    assert states.read == [("box-1", "state", "")]
    assert jobs.read == [("box-2", "job", "job-7")]
    assert set(door.take_seen()) == {"box-1", "box-2"}
    assert door.take_seen() == {}
    with pytest.raises(ValueError, match="two readers"):
        dispatcher(states, Reader("rep"))


async def test_what_the_broker_had_kept_is_no_sign_of_life() -> None:
    door, _ = dispatcher(Reader("state"))
    await door.receive(Message("ea/1/up/box-1/state", b"{}", retain=True))
    assert door.take_seen() == {}


async def test_subscriptions_are_the_topics_with_a_reader_once_for_a_group() -> None:
    door, _ = dispatcher(Reader("state"), Reader("tm", "job"))
    door.listen("ea/1/claim/req", Reader("req").handle)  # type: ignore[arg-type]
    plain = [each.topic_filter for each in door.subscriptions()]
    assert plain == ["ea/1/up/+/job/#", "ea/1/up/+/state", "ea/1/up/+/tm/#", "ea/1/claim/req/#"]
    assert [each.topic_filter for each in door.subscriptions("hub")] == [f"$share/hub/{each}" for each in plain]


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "ea/1/up",
        "ea/1/up/",
        "ea/1/up//state",
        "ea/1/up/BOX/state",
        "ea/1/up/box-1",
        "ea/1/up/box-1/nothing",
        "ea/2/up/box-1/state",
        "ea/1/dn/box-1/des",
        f"ea/1/up/{'x' * 64}/state",
    ],
)
async def test_a_topic_that_nobody_reads_is_refused(topic: str) -> None:
    reader = Reader("state")
    door, metrics = dispatcher(reader)
    await door.receive(Message(topic, b"{}"))
    assert reader.read == []
    assert b'appliance_hub_refused_messages_total{reason="bad_topic"} 1.0' in metrics.render()


async def test_what_is_too_large_is_not_read() -> None:
    reader = Reader("state")
    door, metrics = dispatcher(reader)
    await door.receive(Message("ea/1/up/box-1/state", b"x" * LARGEST_DOCUMENT_BYTES))
    await door.receive(Message("ea/1/up/box-1/state", b"x" * (LARGEST_DOCUMENT_BYTES + 1)))
    assert len(reader.read) == 1
    assert b'reason="too_large"} 1.0' in metrics.render()


async def test_who_sends_nonsense_all_day_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "appliance.hub")
    clock = HandClock()
    door, metrics = dispatcher(Reader("state"), clock=clock)
    for _ in range(100):
        await door.receive(Message("ea/1/up/box-1/nothing", b""))
        await door.receive(Message("ea/1/up/box-2/nothing\n", b""))
    assert len(caplog.records) == 2
    assert all(each.getMessage().isprintable() for each in caplog.records)
    clock.now += LOG_EVERY_S
    await door.receive(Message("ea/1/up/box-1/nothing", b""))
    assert len(caplog.records) == 3
    assert b'reason="bad_topic"} 201.0' in metrics.render()


async def test_complaints_remember_only_so_many_devices() -> None:
    clock = HandClock()
    complaints = Complaints(clock, HubMetrics())
    for number in range(DEVICES_REMEMBERED + 5):
        complaints.refuse(f"box-{number}", "bad_topic", "")
    assert len(complaints._said) == DEVICES_REMEMBERED
    clock.now += LOG_EVERY_S
    complaints.refuse("late", "bad_topic", "")
    assert list(complaints._said) == ["late"]


async def test_a_message_waits_for_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broker: Broker) -> None:
    monkeypatch.setattr(mqtt, "RETRY_S", 0.01)
    link = HubLink(hub_settings(tmp_path / "hub", broker), SystemClock())
    tried = 0

    async def receive(_: Message) -> None:
        nonlocal tried
        tried += 1
        if tried < 4:
            raise StorageError("The disk is full.")

    async with asyncio.timeout(20):
        await link._keep_at_it(receive, Message("ea/1/up/box-1/state", b""))
    assert tried == 4


async def test_a_damaged_database_ends_the_hub_and_nothing_is_acknowledged(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = hub_settings(tmp_path / "hub", broker)

    async def refuse(*_: object, **__: object) -> None:
        raise UnreadableDatabaseError("The file is damaged.")

    async def serve_badly(device: Peer) -> None:
        async with running_hub(settings) as hub:
            monkeypatch.setattr(hub.means.devices, "note_state", refuse)
            await device.link.publish(state_message("box-1", born(1), retain=False))
            await asyncio.wait_for(asyncio.Event().wait(), 60)

    async with Peer(broker.options("box-1")) as device:
        with pytest.raises(BaseExceptionGroup) as ended:
            await serve_badly(device)
        assert ended.group_contains(UnreadableDatabaseError)
        async with running_hub(settings) as hub:
            await until(lambda: hub.means.devices.find("box-1"), "the birth came again")
