"""Desired twins and commands on their way to devices, over a real broker, from a real hub."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.clock import SystemClock
from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError, TooLargeError
from appliance.core.fleet import Answer, Command, CommandResult, Desired, Question, Reported, down, up
from appliance.core.hub_settings import HubSettings
from appliance.core.messaging import Message
from appliance.core.releases import DESIRED_TYPE
from appliance.hub import twins
from appliance.hub.authority import Authority
from appliance.hub.desired import DesiredDocument, changed, check_document, check_result, put_together
from appliance.hub.device_names import check_groups, check_labels
from appliance.hub.director import director_keys
from appliance.hub.room import Hub
from appliance.security.envelopes import open_envelope
from appliance.security.signing import PublicKey
from tests.fleet.broker import Broker, Peer
from tests.hub.hubs import (
    born,
    commands_beside,
    hub_process,
    hub_settings,
    report_message,
    running_hub,
    state_message,
    until,
    until_device,
)

DEVICE = "box-1"


def _published(hub: Hub) -> bool:
    current = hub.means.twins.current(DEVICE)
    return current is not None and current.published is not None


def opened(message: Message, folder: Path) -> Desired:
    """Return a desired twin whose signature was checked as a device does."""
    keys = [PublicKey(each) for each in director_keys(Authority(folder, SystemClock())).keys]
    return msgspec.json.decode(open_envelope(message.payload, DESIRED_TYPE, keys), type=Desired)


@pytest.mark.anyio
async def test_a_desired_twin_of_group_and_device_reaches_the_device_signed(tmp_path: Path, broker: Broker) -> None:
    folder = tmp_path / "hub"
    async with running_hub(hub_settings(folder, broker)) as hub:
        await hub.means.devices.expect(DEVICE)
        await hub.means.devices.describe(DEVICE, groups=["line-3"], labels={"hall": "A"}, actor="test")
        store = hub.means.twins
        group = DesiredDocument({"log_level": "debug", "threads": 2}, {"health": 60.0}, {"chat": "7"})
        await store.set("group", "line-3", group, expected_version=0, actor="test")
        async with Peer(broker.options(DEVICE), down(DEVICE, "des")) as device:
            first = opened(await device.next(), folder)
            assert first == Desired(DEVICE, 1, group.settings, group.telemetry, group.models)
            own = DesiredDocument({"log_level": "info"})
            await store.set("device", DEVICE, own, expected_version=0, actor="test")
            second = opened(await device.next(), folder)
            assert (second.version, second.settings) == (2, {"log_level": "info", "threads": 2})
            with pytest.raises(ConflictError):
                await store.set("device", DEVICE, DesiredDocument(), expected_version=0, actor="test")
            assert store.get("device", DEVICE).document == own
            await hub.means.devices.describe(DEVICE, groups=[], labels={}, actor="test")
            third = opened(await device.next(), folder)
            assert (third.version, third.settings, third.models) == (3, {"log_level": "info"}, {})
        async with Peer(broker.options(DEVICE), down(DEVICE, "des")) as device:
            assert opened(await device.next(), folder) == third, "the broker keeps it"


@pytest.mark.anyio
async def test_a_broker_without_memory_is_told_again_when_the_device_reports_an_older_twin(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins, "SETTLE_S", 0.0)
    folder = tmp_path / "hub"
    async with running_hub(hub_settings(folder, broker)) as hub:
        await hub.means.devices.expect(DEVICE)
        await hub.means.twins.set("device", DEVICE, DesiredDocument({"threads": 2}), expected_version=0, actor="test")
        await until(lambda: _published(hub), "published")
        broker.restart(memory=False)
        async with Peer(broker.options(DEVICE), down(DEVICE, "des")) as device:
            await until(lambda: hub.link.up, "the hub is back")
            await device.link.publish(report_message(DEVICE, Reported(1, 0)))
            assert opened(await device.next(30), folder).version == 1


@pytest.mark.anyio
async def test_a_hub_from_a_backup_overtakes_the_version_that_a_device_has_applied(
    tmp_path: Path, broker: Broker
) -> None:
    folder = tmp_path / "hub"
    async with running_hub(hub_settings(folder, broker)) as hub:
        await hub.means.devices.expect(DEVICE)
        await hub.means.twins.set("device", DEVICE, DesiredDocument({"threads": 2}), expected_version=0, actor="test")
        async with Peer(broker.options(DEVICE), down(DEVICE, "des")) as device:
            assert opened(await device.next(), folder).version == 1
            await device.link.publish(report_message(DEVICE, Reported(1, 41)))
            overtaken = opened(await device.next(30), folder)
            assert (overtaken.version, overtaken.settings) == (42, {"threads": 2})


@pytest.mark.anyio
async def test_a_device_asks_for_time_and_for_its_desired_twin(tmp_path: Path, broker: Broker) -> None:
    folder = tmp_path / "hub"
    settings = hub_settings(folder, broker, questions_per_minute=30)
    async with running_hub(settings) as hub, Peer(broker.options(DEVICE), down(DEVICE, "res")) as device:

        async def ask(question: Question, correlation: bytes = b"1") -> Answer:
            payload = msgspec.json.encode(question)
            await device.link.publish(Message(up(DEVICE, "req"), payload, correlation=correlation))
            message = await device.next()
            assert message.correlation == correlation
            return msgspec.msgpack.decode(message.payload, type=Answer)

        now = SystemClock().unix()
        assert abs((await ask(Question("time"), b"time")).now - now) < 30
        assert (await ask(Question("desired"))).code == "not_found"
        await hub.means.devices.expect(DEVICE)
        await hub.means.twins.set("device", DEVICE, DesiredDocument({"threads": 2}), expected_version=0, actor="test")
        answer = await ask(Question("desired"))
        assert answer.ok
        assert opened(Message("", answer.data), folder).settings == {"threads": 2}
        codes = [(await ask(Question("time"), str(number).encode())).code for number in range(12)]
        assert codes[0] == ""
        assert codes[-1] == "overloaded"


@pytest.mark.anyio
async def test_a_device_in_quarantine_is_told_nothing_until_a_person_decides(tmp_path: Path, broker: Broker) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub:
        topics = down(DEVICE, "des"), down(DEVICE, "res")
        async with Peer(broker.options(DEVICE), *topics) as device:
            await device.link.publish(state_message(DEVICE, born(1)))
            await device.link.publish(state_message(DEVICE, born(1, at=2.0)))
            await until_device(hub, DEVICE, lambda each: each.quarantined is not None, "in quarantine")
            store = hub.means.twins
            await store.set("device", DEVICE, DesiredDocument({"threads": 2}), expected_version=0, actor="test")
            question = msgspec.json.encode(Question("desired"))
            await device.link.publish(Message(up(DEVICE, "req"), question, correlation=b"1"))
            answer = msgspec.msgpack.decode((await device.next()).payload, type=Answer)
            assert (answer.ok, answer.code, answer.data) == (False, "quarantined", b"")
            with pytest.raises(ConflictError, match="quarantine"):
                await hub.means.commands.give(DEVICE, "ping", {}, expires_in_s=10, actor="test")
            assert device.received.empty()
            assert (await hub.means.devices.release(DEVICE, actor="test")).quarantined is None
            assert (await device.next()).topic == down(DEVICE, "des")
            await device.link.publish(state_message(DEVICE, born(2)))
            found = await until_device(hub, DEVICE, lambda each: each.epoch == 2, "believed again")
            assert found.quarantined is None


@pytest.mark.anyio
async def test_a_command_is_sent_and_its_reply_kept(tmp_path: Path, broker: Broker) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub:
        await hub.means.devices.expect(DEVICE)
        async with Peer(broker.options(DEVICE), down(DEVICE, "cmd")) as device, Peer(broker.options("box-2")) as other:
            given = await hub.means.commands.give(DEVICE, "ping", {"n": 1}, expires_in_s=60, actor="test")
            message = await device.next()
            command = msgspec.json.decode(message.payload, type=Command)
            assert (command.id, command.name, command.arguments) == (given.id, "ping", {"n": 1})
            assert message.correlation == given.id.encode()
            assert not message.retain
            assert message.expiry_s is not None
            assert message.expiry_s <= 60
            forged = msgspec.json.encode(CommandResult(given.id, True, {"pong": "forged"}))
            await other.link.publish(Message(up("box-2", "res"), forged))
            await other.link.publish(state_message("box-2", born(1)))
            await until_device(hub, "box-2", lambda each: each.status == "online", "the forgery was read")
            assert hub.means.commands.get(given.id).state == "sent"
            for answer in ({"pong": 1}, {"pong": 2}):
                reply = msgspec.json.encode(CommandResult(given.id, True, answer))
                await device.link.publish(Message(up(DEVICE, "res"), reply, correlation=message.correlation))
            done = await hub.means.commands.result(given.id, timeout_s=20)
    assert (done.state, done.result) == ("done", {"pong": 1}), "the first reply counts"


@pytest.mark.anyio
async def test_a_command_given_while_the_hub_was_away_is_sent_and_one_that_is_too_late_expires(
    tmp_path: Path, broker: Broker
) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    async with Peer(broker.options(DEVICE), down(DEVICE, "cmd")) as device:
        async with running_hub(settings) as hub:
            await hub.means.devices.expect(DEVICE)
        given = await _give_beside(settings, 60.0)
        late = await _give_beside(settings, 1.0)
        expired = SystemClock().unix() + 1.0
        await until(lambda: SystemClock().unix() > expired, "the second one has expired")
        with hub_process(settings):
            assert msgspec.json.decode((await device.next()).payload, type=Command).id == given
            await until(lambda: _state_of(settings, late) == "expired", "the late one is given up")
        assert device.received.empty()


@pytest.mark.parametrize(
    ("name", "arguments", "expires_in_s"),
    [("Ping", {}, 10.0), ("ping", {}, 301.0), ("ping", {}, 0.0), ("ping", {"x": "y" * 40_000}, 10.0), ("", {}, 10.0)],
)
@pytest.mark.anyio
async def test_a_bad_command_is_refused_at_the_door(
    tmp_path: Path, broker: Broker, name: str, arguments: dict[str, object], expires_in_s: float
) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub:
        await hub.means.devices.expect(DEVICE)
        with pytest.raises(InvalidRequestError):
            await hub.means.commands.give(DEVICE, name, arguments, expires_in_s=expires_in_s, actor="test")
        with pytest.raises(NotFoundError):
            await hub.means.commands.give("nobody", "ping", {}, expires_in_s=10, actor="test")
        assert not hub.means.commands.of_device(DEVICE)


@pytest.mark.anyio
async def test_a_forgotten_device_is_forgotten_by_the_broker_too(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.hub.devices.SEEN_EVERY_S", 0.1)
    settings = hub_settings(tmp_path / "hub", broker)
    async with running_hub(settings) as hub:
        async with Peer(broker.options(DEVICE)) as device:
            await device.link.publish(state_message(DEVICE, born(1)))
            await until_device(hub, DEVICE, lambda each: each.status == "online", "online")
        await hub.means.twins.set("device", DEVICE, DesiredDocument({"threads": 2}), expected_version=0, actor="test")
        await hub.means.devices.forget(DEVICE, actor="test")
        await until(lambda: not hub.means.devices.forgotten(), "cleared")
    async with running_hub(settings) as hub, Peer(broker.options("box-2")) as device:
        await device.link.publish(state_message("box-2", born(1)))
        await until_device(hub, "box-2", lambda each: each.status == "online", "online")
        assert hub.means.devices.find(DEVICE) is None


BAD_DOCUMENTS = [
    DesiredDocument({"Threads": 1}),
    DesiredDocument({"threads": None}),
    DesiredDocument({"threads": [1]}),
    DesiredDocument({"threads": float("nan")}),
    DesiredDocument(telemetry={"gossip": 1.0}),
    DesiredDocument(telemetry={"health": -1.0}),
    DesiredDocument(telemetry={"health": float("inf")}),
    DesiredDocument(models={"../chat": "1"}),
    DesiredDocument(models={"chat": ""}),
]


@pytest.mark.parametrize("document", BAD_DOCUMENTS)
def test_what_no_device_could_take_is_refused_by_name(document: DesiredDocument) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_document(document)
    assert refused.value.param is not None


def test_a_document_that_is_too_large_is_refused() -> None:
    with pytest.raises(TooLargeError):
        check_document(DesiredDocument({f"s{number}": "x" * 1000 for number in range(60)}))


def test_parts_that_fit_alone_may_not_fit_together() -> None:
    halves = [DesiredDocument({f"{name}{n}": "x" * 1000 for n in range(30)}) for name in "ab"]
    for each in halves:
        check_document(each)
    with pytest.raises(TooLargeError, match=DEVICE):
        check_result(put_together(DEVICE, 1, halves))


@pytest.mark.parametrize(
    "labels",
    [{"": "x"}, {"Hall": "x"}, {"hall": "x" * 201}, {"hall": "\n"}, {f"l{n}": "x" for n in range(33)}],
)
def test_labels_that_will_not_do_are_refused(labels: dict[str, str]) -> None:
    check_labels({"hall": "A", "gone": None})
    with pytest.raises(InvalidRequestError):
        check_labels(labels)


@pytest.mark.parametrize("groups", [[""], ["Line"], [f"g{n}" for n in range(33)]])
def test_groups_that_will_not_do_are_refused(groups: list[str]) -> None:
    check_groups(["line-3"])
    with pytest.raises(InvalidRequestError):
        check_groups(groups)


def test_none_takes_a_value_out() -> None:
    document = DesiredDocument({"a": 1, "b": 2})
    assert changed(document, {"a": None, "c": 3}, field="settings").settings == {"b": 2, "c": 3}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers()), max_size=4))
def test_the_later_document_holds(settings: list[dict[str, int]]) -> None:
    result = put_together(DEVICE, 1, [DesiredDocument(each) for each in settings]).settings
    for name, value in result.items():
        assert [each[name] for each in settings if name in each][-1] == value


async def _give_beside(settings: HubSettings, expires_in_s: float) -> str:
    with commands_beside(settings) as commands:
        return (await commands.give(DEVICE, "ping", {}, expires_in_s=expires_in_s, actor="test")).id


def _state_of(settings: HubSettings, identity: str) -> str:
    with commands_beside(settings) as commands:
        return commands.get(identity).state
