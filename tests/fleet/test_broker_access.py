"""What the broker lets whom do: real mosquitto, the configuration that the hub writes, real certificates."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import replace

import pytest

from appliance.core.errors import PermissionDeniedError, UnavailableError
from appliance.core.fleet import CLAIM_ANSWER, CLAIM_REQUEST, HUB_TOPIC, down, up
from appliance.core.messaging import Message
from appliance.messaging.session import Session
from appliance.security.certificates import CLAIM_NAME, HUB_NAME, Authority
from appliance.store.files import write_durably
from tests.fleet.broker import Broker, Peer

pytestmark = pytest.mark.anyio


def ignore(*_: object) -> None:
    pass


async def test_a_device_writes_its_own_branch_and_the_hub_reads_it(broker: Broker) -> None:
    async with Peer(broker.options(HUB_NAME), "ea/1/up/+/#") as hub, Peer(broker.options("box-1")) as box:
        await box.link.publish(Message(up("box-1", "res"), b"hello", correlation=b"7", response_topic="ea/1/x"))
        received = await hub.next()
    assert (received.topic, received.payload, received.qos) == (up("box-1", "res"), b"hello", 1)
    assert (received.correlation, received.response_topic, received.retain) == (b"7", "ea/1/x", False)


async def test_a_device_cannot_write_another_devices_branch(broker: Broker) -> None:
    async with Peer(broker.options(HUB_NAME), "ea/1/#") as hub, Peer(broker.options("box-1")) as box:
        for topic in (
            up("box-2", "state"),
            down("box-1", "job"),
            down("box-2", "job"),
            HUB_TOPIC,
            f"{CLAIM_REQUEST}/x",
        ):
            with pytest.raises(PermissionDeniedError):
                await box.link.publish(Message(topic, b"forged", retain=True))
        await box.link.publish(Message(up("box-1", "state"), b"mine"))
        assert (await hub.next()).payload == b"mine"
    async with Peer(broker.options(HUB_NAME), "ea/1/#") as late, Peer(broker.options("box-1")) as box:
        await box.link.publish(Message(up("box-1", "state"), b"last"))
        assert (await late.next()).payload == b"last", "nothing forged was kept"


async def test_a_device_reads_nothing_of_another_device(broker: Broker) -> None:
    topics = ("ea/1/dn/box-2/#", "ea/1/up/#", "#", "ea/1/dn/+/job", "ea/1/claim/#", "$share/g/ea/1/dn/box-2/job")
    async with Peer(broker.options(HUB_NAME)) as hub, Peer(broker.options("box-1"), *topics) as spy:
        async with Peer(broker.options("box-2"), "ea/1/dn/box-2/#") as other:
            await hub.link.publish(Message(down("box-2", "job"), b"secret", retain=True))
            await other.link.publish(Message(up("box-2", "rep"), b"secret", retain=True))
            assert (await other.next()).payload == b"secret"
        await hub.link.publish(Message(down("box-1", "job"), b"own"))
        assert (await spy.next()).payload == b"own"
        assert spy.received.empty()
    async with (
        Peer(broker.options("box-1"), *topics, "ea/1/dn/box-1/job") as spy,
        Peer(broker.options(HUB_NAME)) as hub,
    ):
        await hub.link.publish(Message(HUB_TOPIC, b"up"))
        assert (await spy.next()).payload == b"up", "what was kept for another device is not delivered either"


async def test_a_claim_reaches_nothing_else(broker: Broker) -> None:
    async with (
        Peer(broker.options(HUB_NAME), "ea/1/#") as hub,
        Peer(broker.options(CLAIM_NAME), "#", "ea/1/dn/#", "ea/1/all/#", f"{CLAIM_ANSWER}/77") as claim,
    ):
        for topic in (
            up("box-1", "state"),
            up(CLAIM_NAME, "state"),
            down("box-1", "job"),
            HUB_TOPIC,
            f"{CLAIM_ANSWER}/1",
        ):
            with pytest.raises(PermissionDeniedError):
                await claim.link.publish(Message(topic, b"forged"))
        await claim.link.publish(Message(f"{CLAIM_REQUEST}/77", b"please"))
        assert (await hub.next()).topic == f"{CLAIM_REQUEST}/77"
        await hub.link.publish(Message(HUB_TOPIC, b"up", retain=True))
        await hub.link.publish(Message(down("box-1", "job"), b"secret"))
        await hub.link.publish(Message(down(CLAIM_NAME, "job"), b"secret"))
        await hub.link.publish(Message(f"{CLAIM_ANSWER}/77", b"here"))
        assert (await claim.next()).payload == b"here"


async def test_a_revoked_certificate_is_refused_and_the_others_are_not(broker: Broker) -> None:
    async with Peer(broker.options("box-1")):
        pass
    broker.revoke("box-1")
    async with asyncio.timeout(10):
        while True:  # the broker reads the list at its own time
            try:
                session = await Session.open(broker.options("box-1"), None, ignore)
            except UnavailableError:
                break
            session.close(with_will=False)
    async with Peer(broker.options("box-2")):
        pass
    broker.restart()
    with pytest.raises(UnavailableError):
        await Session.open(broker.options("box-1"), None, ignore)


async def test_a_certificate_of_another_authority_is_refused(broker: Broker) -> None:
    stranger = Authority.create("Fleet of a test", time.time()).client("box-1", time.time())
    write_durably(broker.folder / "box-1.crt", stranger.certificate)
    write_durably(broker.folder / "box-1.key", stranger.key, mode=0o600)
    with pytest.raises(UnavailableError):
        await Session.open(broker.options("box-1"), None, ignore)


async def connect_and_read(port: int, context: ssl.SSLContext) -> bytes:
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    try:
        return await reader.read()  # TLS 1.3 tells it with the first data only
    finally:
        writer.close()


async def test_a_client_without_a_certificate_is_refused(broker: Broker) -> None:
    context = ssl.create_default_context(cafile=str(broker.files.authority))
    with pytest.raises(ssl.SSLError):
        await connect_and_read(broker.port, context)


async def test_a_client_that_knows_no_newer_tls_than_1_1_is_refused(broker: Broker) -> None:
    context = ssl.create_default_context(cafile=str(broker.files.authority))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        await asyncio.open_connection("localhost", broker.port, ssl=context)


async def test_a_device_that_poses_as_the_broker_is_not_believed(broker: Broker) -> None:
    files = broker.device("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        options = replace(broker.options("box-1"), port=server.sockets[0].getsockname()[1])
        with pytest.raises(UnavailableError, match="purpose"):
            await Session.open(options, None, ignore)


async def test_the_client_id_is_the_certificates_name_whatever_the_client_says(broker: Broker) -> None:
    async with Peer(broker.options("box-1"), "ea/1/dn/box-1/#") as box:
        pushy = replace(broker.options("box-2"), client_id="box-1")
        async with Peer(pushy), Peer(broker.options(HUB_NAME)) as hub:
            await hub.link.publish(Message(down("box-1", "cmd"), b"still there"))
            assert (await box.next()).payload == b"still there"
        assert box.link.figures.connects == 1
