"""A certificate is renewed over a real broker; whatever fails, the box keeps one that works."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import ApplianceError, UnavailableError
from appliance.core.fleet import Answer, Question
from appliance.fleet.identity import Identity, IdentityFolder
from appliance.fleet.renewal import Renewal
from appliance.messaging.connection import ConnectionOptions, TlsFiles
from appliance.security.certificates import Authority, certificate_facts, new_request
from tests.fleet.broker import Broker, Peer
from tests.fleet.test_enrolment import DAY_S, Hub, become, contents, running

pytestmark = pytest.mark.anyio


@dataclass
class Box:
    """An enrolled box: what a renewal asks, and what it tells.

    Attributes:
        answers: Instead of the hub's, one a question.
    """

    folder: IdentityFolder
    hub: Hub | None = None
    ahead_s: float = 0.0
    connected: bool = True
    answers: list[Answer | ApplianceError] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    reconnects: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, question: Question, *, timeout_s: float = 10.0) -> Answer:
        self.asked.set()
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, ApplianceError):
                raise answer
            return answer
        assert self.hub is not None
        return await self.hub.part.renew("box-1", question)

    async def publish(self, message: object) -> None:
        raise AssertionError("a renewal asks, and publishes nothing")

    async def alarm(self, kind: str, body: dict[str, Any]) -> None:
        self.alarms.append(f"{kind}: {body['reason']}")

    def reconnect(self) -> None:
        self.reconnects += 1

    def renewal(self, trial_s: float = 300.0) -> Renewal:
        return Renewal(
            self.folder,
            self,
            self,
            SystemClock(),
            now=lambda: time.time() + self.ahead_s,
            reconnect=self.reconnect,
            alarm=self.alarm,
            trial_s=trial_s,
            uniform=lambda: 0.0,
        )

    def identity(self) -> Identity:
        identity = self.folder.identity()
        assert identity is not None
        return identity


@asynccontextmanager
async def enrolled(broker: Broker, tmp_path: Path) -> AsyncIterator[Box]:
    async with running(broker, tmp_path) as hub:
        await become(tmp_path / "box", "box-1", hub.bundle())
        yield Box(IdentityFolder(tmp_path / "box"), hub)


def options(identity: Identity) -> ConnectionOptions:
    tls = TlsFiles(identity.authority, identity.credentials, identity.credentials)
    return ConnectionOptions(identity.host, identity.port, identity.device, tls, timeout_s=5.0)


async def later(box: Box) -> None:
    """Let the clock of certificates go on, so that a renewed one ends later than the one before."""
    assert box.hub is not None
    started = time.time()
    box.hub.part._clock = type("Ahead", (), {"unix": lambda _: started + DAY_S, "monotonic": time.monotonic})()


async def test_a_renewed_certificate_is_used_and_the_old_one_kept_until_it_worked(
    broker: Broker, tmp_path: Path
) -> None:
    async with enrolled(broker, tmp_path) as box:
        await later(box)
        old = box.identity().credentials.read_bytes()
        renewal = box.renewal()
        await renewal.renew()
        identity = box.identity()
        assert (identity.on_trial, box.reconnects) == (True, 1)
        assert box.folder.both_credentials()[1] == old
        async with Peer(options(identity)) as peer:
            assert peer.link.connected
            await renewal.connected()
        assert not box.identity().on_trial
        assert box.folder.both_credentials()[1] is None
        assert certificate_facts(identity.credentials.read_bytes()).serial != certificate_facts(old).serial
        assert box.alarms == []


async def test_a_refused_renewal_is_reported_tried_again_and_changes_no_certificate(
    broker: Broker, tmp_path: Path
) -> None:
    async with enrolled(broker, tmp_path) as box:
        before = box.identity().credentials.read_bytes()
        box.ahead_s = 80 * DAY_S
        box.answers = [Answer(False, code="not_approved", detail="quarantined"), UnavailableError("no hub")]
        renewal = box.renewal()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(renewal.run())
            while not box.alarms:  # noqa: ASYNC110  (no event of ours tells it)
                await asyncio.sleep(0.005)
            task.cancel()
        assert "quarantined" in box.alarms[0]
        assert 55 < (renewal._wait_s() or 0) <= 60, "it is tried again after a while"
        assert box.identity().credentials.read_bytes() == before
        assert not box.identity().on_trial
        assert box.folder.request_key() is not None, "the same key is asked for again"


async def test_before_two_thirds_nobody_is_asked(broker: Broker, tmp_path: Path) -> None:
    async with enrolled(broker, tmp_path) as box:
        box.ahead_s = 50 * DAY_S
        assert box.renewal()._wait_s() == 3600.0
        box.ahead_s = 61 * DAY_S
        assert box.renewal()._wait_s() == 0.0
        box.connected = False
        assert box.renewal()._wait_s() == 10.0, "there is nobody to ask"


@pytest.mark.parametrize("kind", ["another key", "another name", "another authority", "garbage", "no longer"])
async def test_a_wrong_certificate_does_not_replace_the_one_that_works(
    broker: Broker, tmp_path: Path, kind: str
) -> None:
    async with enrolled(broker, tmp_path) as box:
        renewal = box.renewal()
        key, request = new_request("box-1")
        box.folder.keep_request_key(key)
        stranger = Authority.create("Stranger", time.time())
        future = time.time() + DAY_S
        answers: dict[str, Callable[[], bytes]] = {
            "another key": lambda: broker.authority.device("box-1", new_request("box-1")[1], future),
            "another name": lambda: broker.authority.device("box-2", new_request("box-2")[1], future),
            "another authority": lambda: stranger.device("box-1", request, future),
            "garbage": lambda: b"\xff\x00",
            "no longer": lambda: broker.authority.device("box-1", request, time.time(), DAY_S),
        }
        wrong = answers[kind]()
        before = contents(tmp_path / "box")
        box.answers = [Answer(True, data=wrong)]
        with pytest.raises(ApplianceError):
            await renewal.renew()
        assert contents(tmp_path / "box") == before
        assert box.reconnects == 0


async def test_when_the_broker_takes_only_the_old_one_the_box_goes_back_to_it(broker: Broker, tmp_path: Path) -> None:
    async with enrolled(broker, tmp_path) as box:
        old = box.identity().credentials.read_bytes()
        key, request = new_request("box-1")
        renewed = key + broker.authority.device("box-1", request, time.time() + 100 * DAY_S)
        box.folder.try_credentials(renewed)  # not valid yet, as of a hub whose clock is ahead
        box.connected = False
        renewal = box.renewal(trial_s=0.02)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(renewal.run())
            while box.identity().credentials.read_bytes() != old:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            task.cancel()
        assert box.folder.both_credentials() == (old, renewed), "neither is lost"
        async with Peer(options(box.identity())):
            await renewal.connected()
        assert box.folder.both_credentials() == (old, None)
        assert ["certificate_renewal" in each for each in box.alarms] == [True]


def test_two_credentials_that_change_places_are_both_there_after_a_kill(tmp_path: Path) -> None:
    for point in range(4):
        folder = IdentityFolder(tmp_path / str(point))
        folder.folder.mkdir()
        names = ["credentials.pem", "credentials-before.pem", "credentials-spare.pem"]
        states = [("a", "b", None), ("a", "b", "a"), ("b", "b", "a"), ("b", "a", None)]
        for name, content in zip(names, states[point], strict=True):
            if content is not None:
                (folder.folder / name).write_text(content)
        folder.tidy()
        assert set(folder.both_credentials()) == {b"a", b"b"}
        assert not (folder.folder / names[2]).exists()


async def test_enrolment_goes_on_wherever_the_box_was_killed(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = tmp_path / "claim.json"
        bundle.write_bytes(msgspec.json.encode(hub.bundle(allowed=100)))
        program = [sys.executable, "-m", "tests.fleet.killed", "enrol", str(tmp_path / "boxes"), str(bundle)]
        result = await asyncio.to_thread(
            subprocess.run, program, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr
        killed = int(result.stdout)
        assert killed > 8, "it was killed at every change of the disk"
        assert [each.used for each in hub.enrolments.claims()] == [killed + 1], "none cost more than one use"
        for count in range(1, killed + 2):
            identity = IdentityFolder(tmp_path / "boxes" / str(count)).identity()
            assert identity is not None
            certificate = certificate_facts(identity.credentials.read_bytes())
            assert certificate.common_name == f"box-{count}"
            assert len(hub.enrolments.certificates(f"box-{count}")) == 1
