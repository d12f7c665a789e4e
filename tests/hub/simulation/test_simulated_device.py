"""The manners of a simulated device: what it says, what it repeats until the hub knows it, and what it never does."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.core.fleet import (
    HUB_TOPIC,
    CommandResult,
    DeviceState,
    HubState,
    JobReport,
    Reported,
    TelemetryBatch,
    down,
    up,
)
from appliance.core.messaging import Message
from appliance.hub.simulation.device import MOST_KEPT, Said, SimulatedDevice, batch_message
from appliance.hub.simulation.traits import HARDWARE, Scenario, traits_of

ID = "sim-1"
NOW = 1_800_000_000.0
QUIET = Scenario(batch_every_s=0.0)
Action = Literal["install", "cancel", "recall"]


def sealed(document: dict[str, Any]) -> bytes:
    payload = base64.b64encode(msgspec.json.encode(document)).decode()
    return msgspec.json.encode({"payload": payload, "payloadType": "x", "signatures": []})


def job(version: int, action: Action = "install", *, device: str = ID, not_before: float = 0.0) -> Message:
    document = {"device": device, "id": f"job-{version}", "version": version, "action": action}
    return Message(down(ID, "job"), sealed({**document, "not_before": not_before}), retain=True)


def acked(stream: str, boot: int, up_to: int, first: int = 0, refused: str = "") -> Message:
    payload = {"stream": stream, "boot": boot, "up_to": up_to, "first": first, "refused": refused}
    return Message(down(ID, "ack"), msgspec.json.encode(payload), qos=0)


def reports(said: Iterable[Said]) -> list[JobReport]:
    found = [each for each in said if isinstance(each, Message) and each.topic.startswith(up(ID, "job"))]
    return [msgspec.json.decode(each.payload, type=JobReport) for each in found]


def batches(said: Iterable[Said]) -> list[TelemetryBatch]:
    return [each for each in said if isinstance(each, TelemetryBatch)]


def live(device: SimulatedDevice, seconds: float, now: float = NOW) -> list[Said]:
    """Let time pass as the fleet does: whenever something is due."""
    said: list[Said] = []
    while device.due_at <= now + seconds and not device.gone:
        at = device.due_at
        said += device.due(at)
        assert device.due_at > at or device.gone, "time must go on"
    return said


def states(said: Iterable[Said]) -> list[str]:
    return [each.state for each in reports(said)]


def test_a_session_begins_with_a_will_of_a_higher_epoch_and_the_same_birth() -> None:
    device = SimulatedDevice(ID, QUIET, NOW, epoch=7)
    wills = [msgspec.json.decode(device.begin(NOW + n).payload, type=DeviceState) for n in range(2)]
    birth, twin = list(device.greet(NOW + 1))
    assert isinstance(birth, Message)
    assert isinstance(twin, Message)
    said = msgspec.json.decode(birth.payload, type=DeviceState)
    assert [each.epoch for each in wills] == [8, 9]
    assert [each.status for each in (*wills, said)] == ["lost", "lost", "online"]
    assert (said.epoch, said.at, said.instance) == (9, NOW + 1, wills[1].instance)
    assert birth.retain
    assert twin.retain
    assert msgspec.json.decode(twin.payload, type=Reported).facts["hardware"] in HARDWARE


def test_batches_come_at_their_interval_without_holes_and_late_ones_do_not_pile_up() -> None:
    device = SimulatedDevice(ID, Scenario(batch_every_s=60, rows=3, retry_s=1e9), NOW)
    found = batches(live(device, 300))
    assert [(each.first, each.last) for each in found] == [(1 + 3 * n, 3 + 3 * n) for n in range(5)]
    assert all([row.sequence for row in each.rows] == list(range(each.first, each.last + 1)) for each in found)
    assert len(batches(device.due(NOW + 10_000))) == 1
    assert device.due_at > NOW + 10_000 - 60
    assert device.told == 6


def test_a_batch_is_sent_again_until_it_is_acknowledged() -> None:
    device = SimulatedDevice(ID, Scenario(batch_every_s=1000, retry_s=30), NOW)
    (batch,) = batches(live(device, 999))[:1]
    assert batches(device.due(NOW + 2000))[-1].first == batch.first
    assert batches(device.greet(NOW + 2001))[0].first == batch.first
    device = SimulatedDevice(ID, Scenario(batch_every_s=1000, retry_s=30), NOW)
    at = device.due_at
    (batch,) = batches(device.due(at))
    assert list(device.receive(acked("health", 2, batch.last, batch.first), at + 0.5)) == []
    assert list(device.receive(acked("metric", 1, batch.last, batch.first), at + 0.5)) == []
    assert batches(device.greet(at + 0.6)) == [batch]
    list(device.receive(acked("health", 1, batch.last, batch.first), at + 0.75))
    assert (device.kept, device.take_round_trips()) == (1, []), "it was repeated, so the round trip is not known"
    assert batches(device.greet(at + 1)) == []


def test_a_device_that_is_told_to_be_quiet_makes_no_further_batch() -> None:
    device = SimulatedDevice(ID, Scenario(batch_every_s=60, retry_s=30), NOW)
    (batch,) = batches(device.due(device.due_at))
    device.stop_telling()
    assert {each.first for each in batches(live(device, 300))} == {batch.first}


def test_a_round_trip_is_timed_and_a_refusal_is_none() -> None:
    device = SimulatedDevice(ID, Scenario(batch_every_s=100, retry_s=1e9), NOW)
    first, second = device.due_at, device.due_at + 100
    list(device.due(first))
    list(device.due(second))
    list(device.receive(acked("health", 1, 6, 1), first + 0.25))
    list(device.receive(acked("health", 1, 12, 7, refused="malformed"), second + 9))
    assert device.take_round_trips() == [0.25]
    assert device.take_round_trips() == []
    assert (device.told, device.kept) == (2, 1)


def test_what_waits_for_the_hub_is_bounded() -> None:
    device = SimulatedDevice(ID, Scenario(batch_every_s=1, retry_s=1e9), NOW)
    live(device, MOST_KEPT + 9.5)
    assert device.told - device.overflowed == MOST_KEPT
    assert len(batches(device.greet(NOW + 1e4))) == MOST_KEPT


def test_an_install_goes_through_every_state_in_its_time() -> None:
    device = SimulatedDevice(ID, Scenario(batch_every_s=0, job_s=100, retry_s=1e9), NOW)
    said = list(device.receive(job(1), NOW)) + live(device, 99)
    assert states(said)[-1] == "trial"
    said += live(device, 100)
    assert states(said) == (
        ["seen", "verified", "reserved", "fetching", "fetching", "fetched", "staged", "testing", "trial", "confirmed"]
    )
    assert [each.sequence for each in reports(said)] == list(range(1, 11))
    assert device.finished == {"confirmed": 1}


def test_reports_are_sent_again_until_they_are_acknowledged() -> None:
    device = SimulatedDevice(ID, Scenario(batch_every_s=0, job_s=10, retry_s=20), NOW)
    list(device.receive(job(1), NOW))
    live(device, 11)
    assert len(reports(device.due(NOW + 31))) == 10
    list(device.receive(acked("job", 0, 7), NOW + 32))
    assert [each.sequence for each in reports(device.greet(NOW + 33))] == [8, 9, 10]
    list(device.receive(acked("job", 3, 10), NOW + 34))
    assert len(reports(device.greet(NOW + 35))) == 3, "that was telemetry's stream of the same name"


@pytest.mark.parametrize(
    ("scenario", "last", "seconds"),
    [
        (Scenario(batch_every_s=0, job_s=10, retry_s=1e9, failing=1.0), "failed", 11.0),
        (Scenario(batch_every_s=0, job_s=10, retry_s=1e9, slow=1.0), "fetching", 11.0),
        (Scenario(batch_every_s=0, job_s=10, retry_s=1e9, slow=1.0), "confirmed", 101.0),
        (Scenario(batch_every_s=0, job_s=10, retry_s=1e9, lost=1.0), "fetching", 1000.0),
    ],
    ids=["failing", "slow so far", "slow", "lost"],
)
def test_a_device_does_what_the_scenario_wants(scenario: Scenario, last: str, seconds: float) -> None:
    device = SimulatedDevice(ID, scenario, NOW)
    said = list(device.receive(job(1), NOW)) + live(device, seconds)
    assert states(said)[-1] == last
    assert device.gone is bool(scenario.lost)
    if device.gone:
        assert list(device.due(NOW + 1e6)) == []


def test_a_duplicating_device_says_reports_and_batches_twice() -> None:
    device = SimulatedDevice(ID, Scenario(batch_every_s=60, duplicating=1.0, retry_s=1e9), NOW)
    assert states(device.receive(job(1), NOW)) == ["seen", "seen"]
    first, again = batches(live(device, 59))
    assert first == again
    assert device.told == 1


def test_an_old_job_and_one_of_another_device_change_nothing() -> None:
    device = SimulatedDevice(ID, QUIET, NOW)
    assert states(device.receive(job(5), NOW)) == ["seen"]
    for other in (job(5), job(4, "cancel"), job(9, device="sim-2"), Message(down(ID, "job"), b"", retain=True)):
        assert list(device.receive(other, NOW + 0.1)) == []
    assert "confirmed" in states(live(device, 30))


def test_a_job_waits_for_its_time() -> None:
    device = SimulatedDevice(ID, QUIET, NOW)
    assert list(device.receive(job(1, not_before=NOW + 50), NOW)) == []
    assert device.due_at == NOW + 50
    assert states(live(device, 200))[-1] == "confirmed"


def test_a_cancel_ends_a_job_on_its_way_and_comes_too_late_after_it() -> None:
    device = SimulatedDevice(ID, QUIET, NOW)
    list(device.receive(job(1), NOW))
    assert states(device.receive(job(2, "cancel"), NOW + 5)) == ["canceled"]
    assert device.due_at == NOW + QUIET.retry_s
    assert list(device.receive(job(3, "cancel"), NOW + 6)) == []
    assert device.finished == {"canceled": 1}


def test_a_recall_goes_back() -> None:
    device = SimulatedDevice(ID, QUIET, NOW)
    said = [*device.receive(job(1, "recall"), NOW), *live(device, 29)]
    assert states(said) == ["seen", "rolled_back"]
    assert reports(said)[-1].code == "recalled"


def test_a_command_is_answered_and_its_duplicate_gets_the_same_answer() -> None:
    device = SimulatedDevice(ID, QUIET, NOW)

    def command(name: str, expires: float = 0.0, *, retain: bool = False) -> Message:
        payload = msgspec.json.encode({"id": name, "name": "ping", "expires": expires})
        return Message(down(ID, "cmd"), payload, correlation=name.encode(), retain=retain)

    (first,) = device.receive(command("c1", NOW + 1), NOW)
    (again,) = device.receive(command("c1", NOW + 1), NOW + 2)
    assert isinstance(first, Message)
    assert again is first
    result = msgspec.json.decode(first.payload, type=CommandResult)
    assert (result.ok, result.id, first.correlation) == (True, "c1", b"c1")
    (late,) = device.receive(command("c2", NOW - 1), NOW)
    assert isinstance(late, Message)
    assert msgspec.json.decode(late.payload, type=CommandResult).code == "expired"
    assert list(device.receive(command("c3", retain=True), NOW)) == []
    for number in range(20):
        list(device.receive(command(f"n{number}"), NOW))
    assert next(iter(device.receive(command("c1", NOW + 1), NOW + 3))) is not first, "long forgotten"


def test_the_newest_desired_twin_is_applied_and_reported() -> None:
    device = SimulatedDevice(ID, QUIET, NOW)

    def desired(version: int, name: str = ID) -> Message:
        return Message(down(ID, "des"), sealed({"device": name, "version": version, "settings": {"v": version}}))

    (said,) = device.receive(desired(2), NOW)
    assert isinstance(said, Message)
    twin = msgspec.json.decode(said.payload, type=Reported)
    assert (twin.desired_version, twin.settings) == (2, {"v": 2})
    for other in (desired(2), desired(1), desired(9, "sim-2"), Message(down(ID, "des"), b"")):
        assert list(device.receive(other, NOW)) == []
    (newer,) = device.receive(desired(3), NOW)
    assert isinstance(newer, Message)
    assert msgspec.json.decode(newer.payload, type=Reported).version > twin.version


def test_the_hubs_hold_off_is_noted_and_what_is_not_understood_is_left_alone() -> None:
    device = SimulatedDevice(ID, QUIET, NOW)
    hub = HubState("down", NOW, hold_off_s=120.0)
    assert list(device.receive(Message(HUB_TOPIC, msgspec.json.encode(hub)), NOW)) == []
    assert device.hold_off_s == 120.0
    for kind in ("cmd", "job", "des", "ack"):
        assert list(device.receive(Message(f"ea/1/dn/{ID}/{kind}", b"\xff nonsense"), NOW)) == []
    assert list(device.receive(Message(f"ea/1/dn/{ID}/blk", b"x"), NOW)) == []


def test_traits_are_those_of_the_seed_and_shares_are_kept() -> None:
    names = [f"sim-{number}" for number in range(4000)]
    scenario = Scenario(failing=0.01, lost=0.05, slow=0.1, duplicating=0.5)
    found = [traits_of(scenario, name) for name in names]
    assert found == [traits_of(scenario, name) for name in names]
    assert found != [traits_of(Scenario(seed=1, failing=0.01, lost=0.05), name) for name in names]
    for trait, share in (("failing", 0.01), ("lost", 0.05), ("slow", 0.1), ("duplicating", 0.5)):
        assert abs(sum(getattr(each, trait) for each in found) / len(found) - share) < 0.02, trait
    assert {each.hardware for each in found} == set(HARDWARE)
    assert abs(sum(each.phase for each in found) / len(found) - 0.5) < 0.02


def test_a_batch_is_named_by_what_is_in_it() -> None:
    batch = TelemetryBatch("health", 3, 7, 12, [])
    message = batch_message(ID, batch, b"packed")
    assert (message.topic, message.payload, message.correlation) == (up(ID, "tm", "health"), b"packed", b"3.7.12")


class Life(RuleBasedStateMachine):
    """Whatever comes in whatever order: nothing that was not acknowledged is forgotten, and sequences have no holes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.device = SimulatedDevice(ID, Scenario(batch_every_s=20, job_s=5, retry_s=7, rows=2), NOW)
        self.known: dict[int, TelemetryBatch] = {}
        self.acknowledged: set[int] = set()
        self.reported: set[int] = set()
        self.report_ack = 0
        self.version = 0

    def note(self, said: Iterable[Said]) -> None:
        for each in said:
            if isinstance(each, TelemetryBatch):
                assert self.known.setdefault(each.first, each) == each, "what is repeated is the same"
                assert each.first not in self.acknowledged
        found = reports(said)
        assert all(each.sequence > self.report_ack for each in found)
        self.reported |= {each.sequence for each in found}

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.note(list(self.device.due(self.now)))

    @rule()
    def connect(self) -> None:
        self.device.begin(self.now)
        said = list(self.device.greet(self.now))
        assert {each.first for each in batches(said)} == self.known.keys() - self.acknowledged
        self.note(said)

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        if waiting := sorted(self.known.keys() - self.acknowledged):
            first = data.draw(st.sampled_from(waiting))
            self.acknowledged.add(first)
            self.note(list(self.device.receive(acked("health", 1, self.known[first].last, first), self.now)))

    @rule(ack=st.integers(0, 50))
    def acknowledge_reports(self, ack: int) -> None:
        self.report_ack = max(self.report_ack, min(ack, max(self.reported, default=0)))
        self.note(list(self.device.receive(acked("job", 0, self.report_ack), self.now)))

    @rule(action=st.sampled_from(["install", "cancel", "recall"]), again=st.booleans())
    def order(self, action: Action, again: bool) -> None:
        self.version += not again
        self.note(list(self.device.receive(job(max(1, self.version), action), self.now)))

    @rule(payload=st.binary(max_size=40), kind=st.sampled_from(["cmd", "des", "job", "ack", "res"]))
    def babble(self, payload: bytes, kind: str) -> None:
        self.note(list(self.device.receive(Message(f"ea/1/dn/{ID}/{kind}", payload), self.now)))

    @invariant()
    def sequences_have_no_holes(self) -> None:
        rows = sorted(row.sequence for each in self.known.values() for row in each.rows)
        assert rows == list(range(1, len(rows) + 1))
        assert self.device.kept == len(self.acknowledged)
        assert self.reported == set(range(1, len(self.reported) + 1))


TestLife = Life.TestCase


def test_it_counts_what_it_said_again_and_knows_whether_it_was_ever_asked() -> None:
    device = SimulatedDevice(ID, QUIET, NOW, epoch=7)
    device.begin(NOW)
    list(device.greet(NOW))
    assert (device.said, device.asked, device.repeated) == ((8, 8), False, 0)
    list(device.receive(job(1), NOW))
    list(device.greet(NOW + 1))
    assert (device.asked, device.repeated) == (True, 1)
