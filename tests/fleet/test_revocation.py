"""A device that is revoked while it is connected is put out at once, stays out, and hurts nobody else."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.core.errors import UnavailableError
from appliance.core.messaging import Message
from appliance.hub.enrolment_records import Barred
from appliance.hub.init import HubFiles, load_authority
from appliance.hub.takeovers import AGAIN_S, KEPT_S, is_due
from appliance.messaging.options import TlsFiles
from appliance.messaging.session import Session
from tests.fleet.broker import Peer
from tests.fleet.made_hub import made_hub, options_of, soon
from tests.hub.hubs import born, lost, state_message, until, until_device, will_of

pytestmark = pytest.mark.anyio

NOW = 1_000_000.0


def _far() -> float:
    """Let a peer that was put out wait for long, rather than knock all the time."""
    return 1.0


async def _open(options: object) -> Session:
    return await Session.open(options, None, lambda *_: None)  # type: ignore[arg-type]


async def test_a_revoked_device_is_put_out_at_once_and_cannot_come_back(tmp_path: Path) -> None:
    async with made_hub(tmp_path / "hub") as made:
        thief = await made.enrol(tmp_path / "1", "box-1")
        other = await made.enrol(tmp_path / "2", "box-2")
        async with (
            Peer(options_of(other), "ea/1/dn/box-2/#") as innocent,
            Peer(options_of(thief), "ea/1/dn/box-1/#", will=will_of("box-1", 1, delay_s=600), uniform=_far) as peer,
        ):
            await peer.link.publish(state_message("box-1", born(1)))
            await innocent.link.publish(state_message("box-2", born(1)))
            await until_device(made.hub, "box-1", lambda found: found.status == "online", "it is online")
            made.enrolments.revoke("box-1", actor="ann", now=time.time())
            await until(lambda: not peer.link.connected, "its connection has ended")
            await until_device(made.hub, "box-1", lambda found: found.status == "lost", "it is said to be lost")
            with pytest.raises(UnavailableError):
                await _open(options_of(thief))
            with pytest.raises(UnavailableError):
                await peer.link.publish(Message("ea/1/up/box-1/rep", b"{}"))
            await made.hub.link.publish(Message("ea/1/dn/box-2/cmd", b"still here"))
            assert (await innocent.next()).payload == b"still here"
            assert innocent.link.figures.attempts == 1, "the other device was never disconnected"


async def test_what_waited_at_the_broker_for_a_revoked_device_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with made_hub(tmp_path / "hub") as made:
        options = options_of(await made.enrol(tmp_path / "1", "box-1"))
        async with Peer(options, "ea/1/dn/box-1/#"):
            pass
        await made.hub.link.publish(Message("ea/1/dn/box-1/cmd", b"secret"))
        made.enrolments.revoke("box-1", actor="ann", now=time.time())
        await until(lambda: "the connection of box-1" in caplog.text, "the hub took its session")
        with pytest.raises(UnavailableError):
            await _open(options)
        identity = load_authority(made.settings).client("box-1", time.time())
        (tmp_path / "key").write_bytes(identity.key)
        (tmp_path / "certificate").write_bytes(identity.certificate)
        assert options.tls is not None
        tls = TlsFiles(options.tls.authority, tmp_path / "certificate", tmp_path / "key")
        async with Peer(replace(options, tls=tls), "ea/1/dn/box-1/#") as successor:
            await made.hub.link.publish(Message("ea/1/dn/box-1/cmd", b"news"))
            assert (await successor.next()).payload == b"news"


async def test_a_broker_that_was_not_told_is_made_to_put_the_device_out_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.hub.devices.SEEN_EVERY_S", 0.1)
    monkeypatch.setattr("appliance.hub.takeovers.AGAIN_S", 0.5)
    async with made_hub(tmp_path / "hub") as made:
        identity = await made.enrol(tmp_path / "1", "box-1")
        process = HubFiles.of(made.settings).broker_process
        number = process.read_text()
        process.write_text("")
        async with Peer(options_of(identity), will=will_of("box-1", 1)) as peer:
            await peer.link.publish(state_message("box-1", born(1)))
            made.enrolments.revoke("box-1", actor="ann", now=time.time())
            await until(lambda: peer.link.figures.attempts > 1, "it was put out and came back")
            await soon(peer.link.until_connected())
            process.write_text(number)
            HubFiles.of(made.settings).revoked.unlink()  # so that the hub writes it anew, and tells the broker
            await peer.link.publish(state_message("box-1", lost(2)))
            await until(lambda: not peer.link.connected, "it is out")
            with pytest.raises(UnavailableError):
                await _open(options_of(identity))


def test_a_connection_is_ended_once_and_again_only_when_its_device_is_heard() -> None:
    silent = Barred("box-1", NOW, 0.0)
    assert is_due(silent, None, NOW + 1)
    assert is_due(silent, None, NOW + KEPT_S - 1)
    assert not is_due(silent, None, NOW + KEPT_S), "the broker has forgotten its session"
    assert is_due(Barred("box-1", NOW, NOW + 1), None, NOW + KEPT_S)
    assert not is_due(silent, NOW, NOW + AGAIN_S + 1)
    heard = Barred("box-1", NOW, NOW + 5)
    assert not is_due(heard, NOW + 4, NOW + 4 + AGAIN_S)
    assert is_due(heard, NOW + 4, NOW + 5 + AGAIN_S)
    assert not is_due(heard, NOW + 5, NOW + 100)
