"""The connection against a real broker, over mutual TLS: what it survives, and what it tells."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
import struct
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from appliance.core.errors import InvalidRequestError, PermissionDeniedError, TooLargeError, UnavailableError
from appliance.core.fleet import HUB_TOPIC, down, up
from appliance.core.messaging import Message, Subscription
from appliance.hub.broker import LARGEST_PACKET_BYTES
from appliance.messaging.connection import Connection, Will
from appliance.messaging.opening import Opening
from appliance.messaging.options import ConnectionOptions
from appliance.messaging.session import Session
from appliance.security.certificates import HUB_NAME
from tests.fleet.broker import Broker, Peer, free_port
from tests.fleet.relay import relay

DEADLINE_S = 60.0
TRIES = 100
COMMAND = down("box-1", "cmd")


def ignore(*_: object) -> None:
    pass


async def nothing(_: Message) -> None:
    pass


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not true():  # noqa: ASYNC110 - what it waits for says nothing when it changes
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(link: Connection) -> AsyncIterator[Connection]:
    task = asyncio.get_running_loop().create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


on_both_loops = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": True}), ("asyncio", {"use_uvloop": False})],
    ids=["uvloop", "asyncio"],
)

pytestmark = pytest.mark.anyio


@on_both_loops
async def test_it_comes_back_after_the_broker_was_restarted_with_its_memory(broker: Broker) -> None:
    async with Peer(broker.options(HUB_NAME)) as hub:
        await hub.link.publish(Message(HUB_TOPIC, b"up", retain=True))
    async with Peer(broker.options("box-1"), HUB_TOPIC) as box:
        first = await box.next()
        assert (first.payload, first.retain) == (b"up", True)
        broker.restart()
        again = await box.next()
        assert (again.payload, again.retain) == (b"up", True), "it subscribed anew, and the broker had kept it"
        assert box.link.figures.connects == 2


async def test_it_says_everything_anew_after_the_broker_was_restarted_without_its_memory(broker: Broker) -> None:
    async def greet() -> None:
        await link.publish(Message(up("box-1", "state"), b"online", retain=True))

    link = Connection(broker.options("box-1"), nothing, on_connected=greet, uniform=lambda: 0.0)
    async with running(link):
        async with Peer(broker.options(HUB_NAME), "ea/1/up/+/state") as hub:
            assert (await hub.next()).payload == b"online"
        broker.restart(memory=False)
        async with Peer(broker.options(HUB_NAME), "ea/1/up/+/state") as hub:
            assert (await hub.next()).payload == b"online"


async def test_a_message_may_be_lost_after_the_broker_confirmed_it_so_only_the_other_end_can_acknowledge(
    broker: Broker,
) -> None:
    lasting = replace(broker.options(HUB_NAME), clean_start=False, session_expiry_s=600)
    async with Peer(lasting, "ea/1/up/#"):
        pass
    async with Peer(broker.options("box-1")) as box:
        await box.link.publish(Message(up("box-1", "res"), b"confirmed"))
        broker.stop(signal.SIGKILL)
        await until(lambda: not box.link.connected)
        broker.start()
        await box.link.until_connected()
        async with Peer(lasting, "ea/1/up/#") as hub:
            await box.link.publish(Message(up("box-1", "res"), b"sent again"))
            assert (await hub.next()).payload == b"sent again", "what was confirmed before is gone"


async def test_what_was_not_acknowledged_is_delivered_twice_and_what_was_is_not(broker: Broker) -> None:
    options = replace(broker.options("box-1"), clean_start=False, session_expiry_s=600)
    arrived: asyncio.Queue[tuple[Message, int]] = asyncio.Queue()

    def arrive(_: Session, message: Message, packet: int) -> None:
        arrived.put_nowait((message, packet))

    async with Peer(broker.options(HUB_NAME)) as hub, asyncio.timeout(DEADLINE_S):
        session = await Session.open(options, None, arrive)
        await session.subscribe([Subscription(COMMAND)])
        await hub.link.publish(Message(COMMAND, b"first"))
        await hub.link.publish(Message(COMMAND, b"second"))
        assert [(await arrived.get())[0].payload, (await arrived.get())[0].payload] == [b"first", b"second"]
        session.acknowledge(1)
        session.close(with_will=False)
        session = await Session.open(options, None, arrive)
        again, packet = await arrived.get()
        assert again.payload == b"second"
        session.acknowledge(packet)
        session.close(with_will=False)
        session = await Session.open(options, None, arrive)
        await hub.link.publish(Message(COMMAND, b"third"))
        assert (await arrived.get())[0].payload == b"third"
        session.close(with_will=False)


async def test_acknowledgements_keep_the_order_of_the_messages(broker: Broker) -> None:
    options = replace(broker.options("box-1"), clean_start=False, session_expiry_s=600, receive_maximum=2)
    arrived: asyncio.Queue[tuple[Message, int]] = asyncio.Queue()

    def arrive(_: Session, message: Message, packet: int) -> None:
        arrived.put_nowait((message, packet))

    async with Peer(broker.options(HUB_NAME)) as hub, asyncio.timeout(DEADLINE_S):
        session = await Session.open(options, None, arrive)
        await session.subscribe([Subscription(COMMAND)])
        for number in range(4):
            await hub.link.publish(Message(COMMAND, b"%d" % number))
        first, second = await arrived.get(), await arrived.get()
        session.acknowledge(second[1])
        session.acknowledge(second[1])
        session.acknowledge(999)
        await hub.link.publish(Message(down("box-1", "des"), b"a round trip"))
        assert arrived.empty(), "the broker still waits for the first, so it sends no third"
        session.acknowledge(first[1])
        assert (await arrived.get())[0].payload == b"2"
        session.close(with_will=False)


KEPT = 600
WINDOW = 32


class Backlog:
    """Handles what the broker kept: all, or some and then no more until told to go on."""

    def __init__(self, before_a_pause: int = KEPT) -> None:
        self.handled: list[str] = []
        self.go_on = asyncio.Event()
        self._before_a_pause = before_a_pause

    async def handle(self, message: Message) -> None:
        if len(self.handled) >= self._before_a_pause:
            await self.go_on.wait()
        self.handled.append(message.topic)


async def keep_much(broker: Broker) -> None:
    """Have the broker keep more messages than a window holds many times over."""
    async with Peer(broker.options(HUB_NAME)) as hub, asyncio.TaskGroup() as group:
        for number in range(KEPT):
            group.create_task(hub.link.publish(Message(up(f"box-{number}", "state"), b"kept", retain=True)))


def slow_hub(broker: Broker, backlog: Backlog, port: int) -> Connection:
    options = replace(
        broker.options(HUB_NAME), port=port, clean_start=False, session_expiry_s=600, receive_maximum=WINDOW
    )
    states = [Subscription("ea/1/up/+/state")]
    return Connection(options, backlog.handle, subscriptions=states, lanes=8, at_once=True, uniform=lambda: 0.0)


@on_both_loops
async def test_what_a_broker_kept_of_many_is_read_no_faster_than_it_is_handled(broker: Broker) -> None:
    """Mosquitto 2.0 sends all it has once one is acknowledged, whatever window it was told; see its issue 2301."""
    await keep_much(broker)
    backlog = Backlog(before_a_pause=WINDOW)
    link = slow_hub(broker, backlog, broker.port)
    async with running(link):
        await until(lambda: link.figures.received > 2 * WINDOW)
        async with Peer(broker.options("box-1"), HUB_TOPIC) as box:  # the broker has had time to send more
            await box.link.publish(Message(up("box-1", "res"), b"a round trip"))
        assert link.figures.received < KEPT / 2
        backlog.go_on.set()
        await until(lambda: len(backlog.handled) == KEPT)
        broker.restart()
        await until(lambda: len(backlog.handled) == 2 * KEPT)
        await link.until_connected()
    assert link.figures.connects == 2, "the flood is no reason to break off"
    assert len(set(backlog.handled)) == KEPT


async def test_after_a_short_gap_only_a_broker_that_forgot_us_says_again_what_it_keeps(broker: Broker) -> None:
    state = up("box-1", "state")
    after_it = Message(down("box-1", "des"), b"the broker has our acknowledgement when it takes this")
    heard: list[bytes] = []
    anew: list[int] = []

    async def hear(message: Message) -> None:
        heard.append(message.payload)

    link = Connection(
        replace(broker.options(HUB_NAME), clean_start=False, session_expiry_s=600),
        hear,
        subscriptions=[Subscription("ea/1/up/+/state")],
        short_gap_s=60.0,
        on_anew=lambda: anew.append(link.figures.connects),
        uniform=lambda: 0.0,
    )
    async with Peer(broker.options("box-1")) as box:
        await box.link.publish(Message(state, b"kept", retain=True))
        async with running(link):
            await until(lambda: heard == [b"kept"])
            await link.publish(after_it)
            broker.restart()
            await until(lambda: link.figures.connects == 2 and box.link.connected)
            await box.link.publish(Message(state, b"news", retain=True))
            await until(lambda: heard == [b"kept", b"news"])
            await link.publish(after_it)
            broker.restart(memory=False)
            await until(lambda: link.figures.connects == 3 and box.link.connected)
            await box.link.publish(Message(state, b"more", retain=True))
            await until(lambda: b"more" in heard)
    assert heard == [b"kept", b"news", b"more"]
    assert anew == [0, 2], "at the beginning, and when the broker had lost its memory"


@on_both_loops
async def test_a_reset_is_noticed_also_while_nothing_is_read(broker: Broker) -> None:
    await keep_much(broker)
    backlog = Backlog(before_a_pause=WINDOW)
    async with relay(broker.port) as between:
        link = slow_hub(broker, backlog, between.port)
        async with running(link):
            await until(lambda: link.figures.received > 2 * WINDOW)
            between.reset()
            await until(lambda: not link.connected)
            backlog.go_on.set()
            await until(lambda: len(set(backlog.handled)) == KEPT)
            await link.until_connected()


@on_both_loops
async def test_a_slow_handler_is_sent_no_more_than_the_window(broker: Broker) -> None:
    handling: list[bytes] = []
    go_on = asyncio.Event()

    async def handle(message: Message) -> None:
        handling.append(message.payload)
        await go_on.wait()

    options = replace(broker.options("box-1"), receive_maximum=4)
    link = Connection(options, handle, subscriptions=[Subscription("ea/1/dn/box-1/#")])
    async with running(link), Peer(broker.options(HUB_NAME), "ea/1/up/#") as hub:
        await link.until_connected()
        for number in range(20):
            await hub.link.publish(Message(COMMAND, b"%d" % number))
        await link.publish(Message(up("box-1", "res"), b"still able to speak"))
        assert (await hub.next()).payload == b"still able to speak"
        assert (link.figures.received, handling) == (4, [b"0"])
        go_on.set()
        await until(lambda: len(handling) == 20)
        assert handling == [b"%d" % number for number in range(20)]
        assert link.figures.connects == 1


async def test_messages_of_one_topic_keep_their_order_though_many_are_handled_at_once(broker: Broker) -> None:
    kinds = ("cmd", "des", "job", "res")
    seen: list[tuple[str, int]] = []
    at_once: list[int] = []
    busy = 0

    async def handle(message: Message) -> None:
        nonlocal busy
        busy += 1
        at_once.append(busy)
        await asyncio.sleep(0 if message.payload[-1] % 2 else 0.002)
        seen.append((message.topic, int(message.payload)))
        busy -= 1

    link = Connection(broker.options("box-1"), handle, subscriptions=[Subscription("ea/1/dn/box-1/#")], lanes=8)
    async with running(link), Peer(broker.options(HUB_NAME)) as hub:
        await link.until_connected()
        for number in range(30):
            for kind in kinds:
                await hub.link.publish(Message(f"ea/1/dn/box-1/{kind}", b"%d" % number))
        await until(lambda: len(seen) == 120)
    for kind in kinds:
        assert [number for topic, number in seen if topic.endswith(kind)] == list(range(30))
    assert max(at_once) > 1


async def test_messages_of_qos_0_that_nobody_can_take_are_dropped_and_counted(broker: Broker) -> None:
    go_on = asyncio.Event()
    handled: list[bytes] = []

    async def handle(message: Message) -> None:
        await go_on.wait()
        handled.append(message.payload[:4])

    link = Connection(broker.options("box-1"), handle, subscriptions=[Subscription(down("box-1", "blk"))])
    async with running(link), Peer(broker.options(HUB_NAME)) as hub:
        await link.until_connected()
        for number in range(20):
            await hub.link.publish(Message(down("box-1", "blk"), b"%04d" % number + bytes(1024 * 1024), qos=0))
        await until(lambda: link.figures.received == 20)
        assert link.figures.dropped == 5, "16 MiB wait, less the four bytes of each"
        go_on.set()
        await until(lambda: len(handled) == 15)


async def test_a_handler_that_fails_is_told_of_in_the_log_and_the_next_message_is_handled(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[bytes] = []

    async def handle(message: Message) -> None:
        handled.append(message.payload)
        if message.payload == b"poison":
            raise ZeroDivisionError

    link = Connection(broker.options("box-1"), handle, subscriptions=[Subscription(COMMAND)])
    async with running(link), Peer(broker.options(HUB_NAME)) as hub:
        await link.until_connected()
        await hub.link.publish(Message(COMMAND, b"poison"))
        await hub.link.publish(Message(COMMAND, b"food"))
        await until(lambda: handled == [b"poison", b"food"])
        assert (link.figures.failed, link.figures.connects) == (1, 1)
    assert "ZeroDivisionError" in caplog.text


async def test_an_oversized_message_is_refused_here_and_the_connection_stands(broker: Broker) -> None:
    async with Peer(broker.options(HUB_NAME), "ea/1/up/#") as hub, Peer(broker.options("box-1")) as box:
        with pytest.raises(TooLargeError, match="1,114,112"):
            await box.link.publish(Message(up("box-1", "res"), bytes(LARGEST_PACKET_BYTES)))
        largest = LARGEST_PACKET_BYTES - len(up("box-1", "res")) - 16
        await box.link.publish(Message(up("box-1", "res"), bytes(largest)))
        assert len((await hub.next()).payload) == largest
        assert box.link.figures.connects == 1


async def test_a_message_above_our_own_limit_is_kept_from_us_by_the_broker(broker: Broker) -> None:
    small = replace(broker.options("box-1"), largest_packet_bytes=2000)
    async with Peer(broker.options(HUB_NAME)) as hub, Peer(small, COMMAND) as box:
        await hub.link.publish(Message(COMMAND, bytes(4000)))
        await hub.link.publish(Message(COMMAND, b"fits"))
        assert (await box.next()).payload == b"fits"
        assert box.link.figures.connects == 1


@on_both_loops
async def test_messages_of_a_megabyte_go_both_ways_at_once(broker: Broker) -> None:
    payloads = [os.urandom(1024 * 1024) for _ in range(8)]
    async with (
        Peer(broker.options(HUB_NAME), "ea/1/up/#") as hub,
        Peer(broker.options("box-1"), COMMAND) as box,
        asyncio.timeout(60),
    ):
        async with asyncio.TaskGroup() as group:
            for payload in payloads:
                group.create_task(hub.link.publish(Message(COMMAND, payload)))
                group.create_task(box.link.publish(Message(up("box-1", "res"), payload)))
        assert [(await box.next()).payload for _ in payloads] == payloads
        assert [(await hub.next()).payload for _ in payloads] == payloads
        assert (hub.link.figures.connects, box.link.figures.connects) == (1, 1)


async def test_more_messages_than_the_brokers_window_are_sent_one_after_the_other(broker: Broker) -> None:
    options = replace(broker.options("box-1"), most_in_flight=3)
    async with Peer(broker.options(HUB_NAME), "ea/1/up/#") as hub, Peer(options) as box:
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(box.link.publish(Message(up("box-1", "res"), b"%d" % number)))
        assert [(await hub.next()).payload for _ in range(50)] == [b"%d" % number for number in range(50)]


@on_both_loops
async def test_what_was_being_sent_when_the_connection_broke_is_told(broker: Broker) -> None:
    async with relay(broker.port) as between:
        options = replace(broker.options("box-1"), port=between.port, most_in_flight=2)
        async with Peer(options) as box:
            between.downward.clear()
            async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
                sending = [
                    group.create_task(expect_unavailable(box.link.publish(Message(up("box-1", "res"), b"x"))))
                    for _ in range(6)
                ]
                await asyncio.sleep(0)
                between.cut()
            assert all(task.done() for task in sending)
            between.downward.set()
            await box.link.until_connected()
            await box.link.publish(Message(up("box-1", "res"), b"again"))


async def expect_unavailable(sending: Awaitable[None]) -> None:
    with pytest.raises(UnavailableError):
        await sending


async def test_a_sender_who_gives_up_harms_no_one_else(broker: Broker) -> None:
    async with relay(broker.port) as between:
        options = replace(broker.options("box-1"), port=between.port, most_in_flight=1)
        async with Peer(options) as box:
            between.downward.clear()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await box.link.publish(Message(up("box-1", "res"), b"impatient"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await box.link.publish(Message(up("box-1", "res"), b"not even sent"))
            between.downward.set()
            async with asyncio.timeout(DEADLINE_S):
                await box.link.publish(Message(up("box-1", "res"), b"patient"))
            assert box.link.figures.connects == 1


@pytest.mark.slow
async def test_a_silent_connection_is_noticed_and_replaced(broker: Broker) -> None:
    async with relay(broker.port) as between:
        options = replace(broker.options("box-1"), port=between.port, keepalive_s=1)
        async with Peer(options) as box:
            between.downward.clear()
            between.upward.clear()
            await until(lambda: not box.link.connected)
            between.downward.set()
            between.upward.set()
            await until(lambda: box.link.figures.connects == 2)


@pytest.mark.slow
async def test_a_quiet_connection_is_kept_by_pings(broker: Broker) -> None:
    async with Peer(replace(broker.options("box-1"), keepalive_s=1), COMMAND) as box:
        await asyncio.sleep(3)  # the broker drops whoever is silent for one and a half times its keepalive
        assert (box.link.connected, box.link.figures.connects) == (True, 1)


@pytest.mark.slow
async def test_the_will_comes_after_its_delay_and_carries_the_epoch_of_its_session(broker: Broker) -> None:
    epochs = iter(range(1, 100))

    def will() -> Will:
        return Will(Message(up("box-1", "state"), b"lost %d" % next(epochs), retain=True), delay_s=1)

    async with relay(broker.port) as between, Peer(broker.options(HUB_NAME), "ea/1/up/+/state") as hub:
        options = replace(broker.options("box-1"), port=between.port)
        async with Peer(options, will=will) as box:
            between.cut()
            await until(lambda: box.link.figures.connects == 2)
            await box.link.publish(Message(up("box-1", "state"), b"online 2"))
            assert (await hub.next()).payload == b"online 2"
            between.downward.clear()
            between.upward.clear()
            cut_at = time.monotonic()
            between.cut()
            assert (await hub.next()).payload == b"lost 2", "the first session's was never said: it was back in time"
            assert time.monotonic() - cut_at >= 0.9


async def test_a_cancelled_connection_leaves_its_will_and_one_that_said_farewell_does_not(broker: Broker) -> None:
    def will() -> Will:
        return Will(Message(up("box-1", "state"), b"lost"), delay_s=0)

    async with Peer(broker.options(HUB_NAME), "ea/1/up/+/state") as hub:
        async with Peer(broker.options("box-1"), will=will):
            pass
        assert (await hub.next()).payload == b"lost"
        async with Peer(broker.options("box-1"), will=will) as box:
            await box.link.say_farewell(Message(up("box-1", "state"), b"stopping"))
        assert (await hub.next()).payload == b"stopping"
        async with Peer(broker.options("box-1")) as box:
            await box.link.publish(Message(up("box-1", "state"), b"next"))
        assert (await hub.next()).payload == b"next"


async def test_what_is_said_at_connecting_comes_before_anything_is_handled(broker: Broker) -> None:
    told: list[str] = []

    async def greet() -> None:
        told.append("greeting")
        await link.publish(Message(up("box-1", "rep"), b"hello"))
        told.append("greeted")

    async def handle(message: Message) -> None:
        told.append(message.payload.decode())

    async with Peer(broker.options(HUB_NAME)) as hub:
        await hub.link.publish(Message(COMMAND, b"kept", retain=True))
    link = Connection(broker.options("box-1"), handle, subscriptions=[Subscription(COMMAND)], on_connected=greet)
    async with running(link):
        await until(lambda: len(told) == 3)
    assert told == ["greeting", "greeted", "kept"]


async def test_a_greeting_that_fails_is_told_of_and_tried_again(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    errors = iter([UnavailableError("no answer"), ZeroDivisionError()])

    async def greet() -> None:
        for error in errors:
            raise error

    link = Connection(broker.options("box-1"), nothing, on_connected=greet, uniform=lambda: 0.0)
    async with running(link), asyncio.timeout(DEADLINE_S):
        await link.until_connected()
        assert link.figures.connects == 3
    assert "ZeroDivisionError" in caplog.text
    assert "no answer" in caplog.text


async def test_a_message_that_may_not_be_written_is_refused_and_the_connection_stands(broker: Broker) -> None:
    async with Peer(broker.options("box-1")) as box:
        with pytest.raises(PermissionDeniedError, match="Not authorized"):
            await box.link.publish(Message(up("box-2", "res"), b"x"))
        for impossible in (Message("ea/1/up/box-1/#", b""), Message("ea/1/up/box-1/x", b"", correlation=bytes(70_000))):
            with pytest.raises(InvalidRequestError):
                await box.link.publish(impossible)
        await box.link.publish(Message(up("box-1", "res"), b"x"))
        assert box.link.figures.connects == 1


@pytest.mark.slow
async def test_expired_messages_are_not_delivered(broker: Broker) -> None:
    lasting = replace(broker.options("box-1"), clean_start=False, session_expiry_s=600)
    async with Peer(lasting, COMMAND):
        pass
    async with Peer(broker.options(HUB_NAME)) as hub:
        await hub.link.publish(Message(COMMAND, b"old", expiry_s=1))
        await hub.link.publish(Message(COMMAND, b"new", expiry_s=600))
        await asyncio.sleep(2.1)  # the broker counts whole seconds
    async with Peer(lasting, COMMAND) as box:
        received = await box.next()
    assert received.payload == b"new"
    assert received.expiry_s is not None
    assert 590 <= received.expiry_s <= 600


async def test_without_a_connection_nothing_is_sent(broker: Broker) -> None:
    link = Connection(broker.options("box-1"), nothing)
    assert not link.connected
    with pytest.raises(UnavailableError, match="no connection"):
        await link.publish(Message(COMMAND, b""))


async def test_a_hold_off_is_waited_for(broker: Broker) -> None:
    async with relay(broker.port) as between:
        link = Connection(replace(broker.options("box-1"), port=between.port), nothing, uniform=lambda: 0.0)
        async with running(link):
            await link.until_connected()
            link.hold_off(1.0)
            began = time.monotonic()
            between.cut()
            await until(lambda: link.figures.connects == 2)
            assert time.monotonic() - began >= 1.0


async def test_a_peer_that_stalls_in_the_handshake_is_given_up(broker: Broker) -> None:
    async with relay(broker.port) as between:
        between.downward.clear()
        options = replace(broker.options("box-1"), port=between.port, timeout_s=0.3)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="timed out"):
            await Session.open(options, None, ignore)
        assert time.monotonic() - began < 5.0


async def test_a_peer_that_drips_its_handshake_is_given_up(broker: Broker) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(b"\x16\x03\x03\x40\x00")
            for _ in range(100):
                writer.write(b"\x02")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()
        done.set()

    done = asyncio.Event()
    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with server, asyncio.timeout(DEADLINE_S):
        port = server.sockets[0].getsockname()[1]
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            await Session.open(replace(broker.options("box-1"), port=port, timeout_s=0.4), None, ignore)
        assert time.monotonic() - began < 3.0
        await done.wait()


@on_both_loops
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x20\xff\xff\xff\xff\xff",
        b"\x20\x03\x00\x87\x00",
        b"\x20\x03\x00\x00\x00\x32\x08\x00\x02\xff\xfe\x00\x01\x00\x00",
        b"\x20\x02\x00",
        b"\xf0\x00",
        bytes(100),
    ],
    ids=["nothing", "http", "length", "refused", "topic", "short", "auth", "zeros"],
)
async def test_a_broker_that_says_nonsense_ends_the_session_and_nothing_else(answer: bytes) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(answer)
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()
        done.set()

    done = asyncio.Event()
    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server, asyncio.timeout(DEADLINE_S):
        options = ConnectionOptions("127.0.0.1", server.sockets[0].getsockname()[1], "box-1", timeout_s=1.0)
        with contextlib.suppress(UnavailableError):
            session = await Session.open(options, None, ignore)
            await session.ended.wait()
        await done.wait()


async def test_a_broker_that_is_not_there_is_told_of_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    options = ConnectionOptions("127.0.0.1", free_port(), "box-1")
    link = Connection(options, nothing, uniform=lambda: 0.0)
    async with running(link):
        await until(lambda: link.figures.attempts >= 3)
    assert "cannot be reached" in caplog.text


@on_both_loops
async def test_cancelling_while_connecting_leaves_no_socket_behind() -> None:
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = ConnectionOptions("127.0.0.1", server.getsockname()[1], "box-1", timeout_s=30.0)
        task = asyncio.get_running_loop().create_task(Session.open(options, None, ignore))
        accepted.append((await asyncio.to_thread(server.accept))[0])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with accepted[0] as far:
            far.settimeout(DEADLINE_S)
            while await asyncio.to_thread(far.recv, 4096):
                pass  # the end of the stream says that it is closed


def test_a_broker_that_resets_before_the_handshake_leaves_no_socket_behind(broker: Broker) -> None:
    def reset_all() -> None:
        for _ in range(TRIES):
            accepted, _address = server.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        resetting = pool.submit(reset_all)
        options = replace(broker.options("box-1"), port=server.getsockname()[1], timeout_s=DEADLINE_S)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            for _ in range(TRIES):
                with pytest.raises(OSError, match=r".+"):
                    Opening(options).open()
            gc.collect()
        resetting.result(DEADLINE_S)
    assert [str(each.message) for each in caught] == []


async def test_certificate_files_are_read_anew_at_each_connecting(broker: Broker) -> None:
    options = broker.options("box-1")
    assert options.tls is not None
    kept = options.tls.key.read_bytes()
    options.tls.key.write_bytes(b"torn")
    with pytest.raises(UnavailableError):
        await Session.open(options, None, ignore)
    options.tls.key.write_bytes(kept)
    session = await Session.open(options, None, ignore)
    session.close(with_will=False)
    assert options.tls.context().minimum_version == ssl.TLSVersion.TLSv1_2


@on_both_loops
async def test_a_connection_that_the_other_end_resets_is_noticed_at_once(broker: Broker) -> None:
    async with relay(broker.port) as between, Peer(replace(broker.options("box-1"), port=between.port)) as box:
        for _ in range(4):
            connects = box.link.figures.connects
            between.reset()
            await until(lambda before=connects: box.link.figures.connects > before)  # type: ignore[misc]
            await box.link.until_connected()
        await box.link.publish(Message(up("box-1", "res"), b"still able to speak"))


@contextlib.contextmanager
def counting_records(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield the sizes of what TLS is given to send; up to 16 KiB make one record."""
    sent: list[int] = []
    send = ssl.SSLSocket.send

    def counted(self: ssl.SSLSocket, data: bytes, flags: int = 0) -> int:
        sent.append(len(data))
        return send(self, data, flags)

    with monkeypatch.context() as patch:
        patch.setattr(ssl.SSLSocket, "send", counted)
        yield sent


async def test_what_is_said_in_one_turn_goes_out_in_one_record(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Peer(broker.options(HUB_NAME), COMMAND) as hub, Peer(broker.options("box-1"), COMMAND) as box:
        said = [Message(COMMAND, b"%d" % number, qos=0) for number in range(50)]
        with counting_records(monkeypatch) as sent:
            await asyncio.gather(*(hub.link.publish(each) for each in said))
        assert len(sent) == 1
        assert [(await box.next()).payload for _ in said] == [each.payload for each in said]


@pytest.mark.slow
async def test_a_client_that_gathers_says_much_in_few_records_and_the_first_word_at_once(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathering_s = 1.0
    options = replace(broker.options(HUB_NAME), gather_s=gathering_s)
    async with Peer(broker.options("box-1"), COMMAND) as box, Peer(options) as hub:
        await asyncio.sleep(gathering_s)  # since it was accepted
        with counting_records(monkeypatch) as sent:
            began = time.monotonic()
            await hub.link.publish(Message(COMMAND, b"0", qos=0))
            assert len(sent) == 1
            for number in range(1, 50):
                await hub.link.publish(Message(COMMAND, b"%d" % number, qos=0))
            heard = [await box.next() for _ in range(50)]
            assert len(sent) <= 1 + (time.monotonic() - began) / (0.9 * gathering_s)  # a loop's clock is a coarse one
        assert [each.payload for each in heard] == [b"%d" % number for number in range(50)]


async def test_a_client_that_gathers_says_farewell_at_once(broker: Broker) -> None:
    options = replace(broker.options("box-1"), gather_s=3600.0)
    async with Peer(broker.options(HUB_NAME), "ea/1/up/+/state") as hub:
        session = await Session.open(options, None, ignore)
        saying = asyncio.ensure_future(session.publish(Message(up("box-1", "state"), b"stopping", qos=0)))
        await asyncio.sleep(0)
        session.close(with_will=False)
        assert (await hub.next()).payload == b"stopping"
        await saying
