"""A box becomes a device at a real broker: waiting, refusals, copies, hostile requests, and what they leave alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from appliance.core.clock import SystemClock
from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError, PermissionDeniedError
from appliance.core.fleet import CLAIM_ANSWER, CLAIM_REQUEST, Claim, ClaimAnswer, ClaimBundle, Question
from appliance.core.hub_settings import HubSettings
from appliance.core.messaging import Message, Subscription
from appliance.fleet.enrolment import Pauses, begin, enrol, read_bundle
from appliance.fleet.identity import Identity, IdentityFolder
from appliance.hub.certifier import HubAuthority
from appliance.hub.enrolment import EnrolmentPart, EnrolmentRules
from appliance.hub.enrolments import SqliteEnrolments
from appliance.hub.init import HubFiles
from appliance.hub.revocations import Revocations
from appliance.hub.schema import MIGRATIONS
from appliance.messaging.connection import Connection, ConnectionOptions, TlsFiles
from appliance.security.certificates import CLAIM_NAME, HUB_NAME, certificate_facts, new_request, revoked_serials
from appliance.store.database import Database
from tests.fleet.broker import Broker, Peer

pytestmark = pytest.mark.anyio

QUICK = Pauses(0.01, 0.05)
DEADLINE_S = 60.0
DAY_S = 86_400.0


class Hub:
    """The hub's side of enrolment at a broker.

    Attributes:
        enrolments: What it keeps.
        part: What answers.
        enrolled: Devices in the order in which certificates were sent.
    """

    def __init__(self, broker: Broker, database: Database, rules: EnrolmentRules) -> None:
        self.enrolments = SqliteEnrolments(database)
        self.broker = broker
        self.enrolled: list[str] = []
        self.link = Connection(
            broker.options(HUB_NAME), self._receive, subscriptions=[Subscription(f"{CLAIM_REQUEST}/#")]
        )
        self.part = EnrolmentPart(
            self.enrolments,
            HubAuthority(broker.authority),
            self.link,
            SystemClock(),
            rules=rules,
            on_enrolled=self._note,
        )

    async def _receive(self, message: Message) -> None:
        await self.part.claim(message)

    async def _note(self, device: str) -> None:
        self.enrolled.append(device)

    def bundle(self, *, allowed: int = 1, automatic: bool = True, days: float = 1.0) -> ClaimBundle:
        now = time.time()
        _, token = self.enrolments.make_claim(
            allowed=allowed, expires=now + days * DAY_S, automatic=automatic, actor="test", now=now
        )
        claim = self.broker.authority.client(CLAIM_NAME, now)
        return ClaimBundle(
            token=token,
            credentials=(claim.key + claim.certificate).decode(),
            authority=self.broker.authority.identity.certificate.decode(),
            host="localhost",
            port=self.broker.port,
            root="{}",
            expires=now + days * DAY_S,
        )

    def states(self) -> list[tuple[str, str]]:
        return [(each.device, each.state) for each in self.enrolments.enrolments()]


@asynccontextmanager
async def running(
    broker: Broker, folder: Path, rules: EnrolmentRules | None = None, *, deadline_s: float = DEADLINE_S
) -> AsyncIterator[Hub]:
    with closing(Database(folder / "hub.db", migrations=MIGRATIONS)) as database:
        hub = Hub(broker, database, rules or EnrolmentRules())
        async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(hub.link.run())
            await hub.link.until_connected()
            yield hub
            task.cancel()


async def become(
    folder: Path, device: str, bundle: ClaimBundle, said: list[str] | None = None, *, pauses: Pauses = QUICK
) -> Identity:
    """Enrol a box whose data is in a folder."""
    identity = IdentityFolder(folder)
    pending = begin(identity, device, bundle)
    assert pending is not None
    say = (said if said is not None else []).append
    return await enrol(identity, pending, facts={"memory": 1}, clock=SystemClock(), say=say, pauses=pauses)


async def until_said(said: list[str], part: str) -> None:
    while not any(part in each for each in said):  # noqa: ASYNC110  (no event of ours tells it)
        await asyncio.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(folder.iterdir())}


async def test_a_box_with_a_claim_becomes_a_device_and_can_speak_as_itself(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        identity = await become(tmp_path / "box", "box-1", hub.bundle())
        assert (identity.device, identity.on_trial, hub.enrolled) == ("box-1", False, ["box-1"])
    tls = TlsFiles(identity.authority, identity.credentials, identity.credentials)
    options = ConnectionOptions(identity.host, identity.port, identity.device, tls)
    async with (
        Peer(broker.options(HUB_NAME), "ea/1/up/+/state") as listener,
        Peer(options) as device,
    ):
        await device.link.publish(Message("ea/1/up/box-1/state", b"{}"))
        assert (await listener.next()).topic == "ea/1/up/box-1/state"


async def test_an_enrolled_box_keeps_no_claim_and_private_files_only(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        await become(tmp_path / "box", "box-1", hub.bundle())
    assert sorted(contents(tmp_path / "box")) == [
        "authority.pem",
        "credentials.pem",
        "hub.json",
        "instance",
        "root.json",
    ]
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "box").iterdir()} == {0o600}


async def test_a_box_waits_for_a_person(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        said: list[str] = []
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(become(tmp_path / "box", "box-1", hub.bundle(automatic=False), said))
            await until_said(said, "has to approve")
            hub.enrolments.approve("box-1", actor="ann", now=time.time())
        assert task.result().device == "box-1"
        assert hub.states() == [("box-1", "issued")]


async def test_a_box_that_is_refused_is_told_and_has_no_identity(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        said: list[str] = []
        bundle = hub.bundle(automatic=False)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(_refused(tmp_path / "box", "box-1", bundle, said))
            await until_said(said, "has to approve")
            hub.enrolments.refuse("box-1", actor="ann", now=time.time())
        assert "operator refused" in task.result()
        assert IdentityFolder(tmp_path / "box").identity() is None
        assert hub.enrolments.certificates() == []


async def _refused(folder: Path, device: str, bundle: ClaimBundle, said: list[str] | None = None) -> str:
    with pytest.raises(PermissionDeniedError) as refusal:
        await become(folder, device, bundle, said)
    return str(refusal.value)


async def test_a_claim_enrols_as_many_boxes_as_it_may(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle(allowed=2)
        await become(tmp_path / "1", "box-1", bundle)
        await become(tmp_path / "2", "box-2", bundle)
        assert "all 2 boxes" in await _refused(tmp_path / "3", "box-3", bundle)
        assert hub.states() == [("box-1", "issued"), ("box-2", "issued")]
        assert [each.used for each in hub.enrolments.claims()] == [2]


async def test_a_claim_that_was_revoked_or_made_up_enrols_nobody(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle()
        hub.enrolments.revoke_claim(hub.enrolments.claims()[0].id, actor="ann", now=time.time())
        assert "revoked" in await _refused(tmp_path / "1", "box-1", bundle)
        made_up = msgspec.structs.replace(bundle, token="guessed")
        assert "does not know" in await _refused(tmp_path / "2", "box-2", made_up)
        assert hub.states() == []


async def test_a_copy_of_an_id_is_quarantined_and_the_first_box_keeps_it(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle(allowed=5)
        await become(tmp_path / "1", "box-1", bundle)
        before = contents(tmp_path / "1")
        assert "Another installation" in await _refused(tmp_path / "2", "box-1", bundle)
        assert hub.states() == [("box-1", "issued"), ("box-1", "quarantined")]
        assert contents(tmp_path / "1") == before
        assert [each.revoked for each in hub.enrolments.certificates()] == [None]
        with pytest.raises(ConflictError, match="--replace"):
            hub.enrolments.approve("box-1", actor="ann", now=time.time())
        hub.enrolments.approve("box-1", actor="ann", now=time.time(), replace=True)
        assert (await become(tmp_path / "2", "box-1", bundle)).device == "box-1"
        old, new = hub.enrolments.certificates()
        assert (old.reason, new.revoked) == ("replaced", None)
        assert old.revoked is not None


async def test_a_revoked_id_comes_back_by_a_person_only(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle(allowed=5)
        await become(tmp_path / "1", "box-1", bundle)
        assert len(hub.enrolments.revoke("box-1", actor="ann", now=time.time())) == 1
        assert hub.enrolments.revoke("box-1", actor="ann", now=time.time()) == []
        said: list[str] = []
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(become(tmp_path / "2", "box-1", bundle, said))
            await until_said(said, "has to approve")
            hub.enrolments.approve("box-1", actor="ann", now=time.time())
        assert task.result().device == "box-1"
        with pytest.raises(NotFoundError):
            hub.enrolments.revoke("box-9", actor="ann", now=time.time())


async def test_the_same_request_gets_the_same_certificate_and_costs_one_use(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle()
        folder = IdentityFolder(tmp_path / "box")
        request = new_request("box-1")[1]
        claim = Claim(bundle.token, "box-1", request.decode(), folder.instance())
        answers = [await _answer(hub, bundle, claim) for _ in range(2)]
        assert answers[0].status == "issued"
        assert answers[0] == answers[1]
        assert [each.used for each in hub.enrolments.claims()] == [1]


async def _answer(hub: Hub, bundle: ClaimBundle, claim: Claim | bytes) -> ClaimAnswer:
    """Ask as a claim does, past all care that a box takes."""
    async with Peer(hub.broker.options(CLAIM_NAME), f"{CLAIM_ANSWER}/abc") as peer:
        payload = claim if isinstance(claim, bytes) else msgspec.json.encode(claim)
        await peer.link.publish(Message(f"{CLAIM_REQUEST}/abc", payload))
        return msgspec.json.decode((await peer.next()).payload, type=ClaimAnswer)


def hostile(name: str = "box-1", *extensions: x509.ExtensionType, key: Any = None, names: int = 1) -> str:
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] * names)
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for each in extensions:
        builder = builder.add_extension(each, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    "request_pem",
    [
        "",
        "garbage",
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        "ключ",
        hostile("box-2"),
        hostile("_hub"),
        hostile("box-1", names=2),
        hostile(key=ec.generate_private_key(ec.SECP192R1())),
        hostile()[:-60] + hostile()[-60:],
    ],
    ids=["empty", "text", "nonsense", "cyrillic", "other", "hub", "two names", "weak", "spliced"],
)
async def test_a_hostile_certificate_request_is_refused_and_leaves_nothing(
    broker: Broker, tmp_path: Path, request_pem: str
) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle()
        answer = await _answer(hub, bundle, Claim(bundle.token, "box-1", request_pem, "i"))
        assert (answer.status, answer.certificate) == ("refused", "")
        assert answer.detail
        assert (hub.states(), hub.enrolments.certificates(), hub.enrolled) == ([], [], [])


async def test_a_request_to_be_an_authority_gets_a_device_and_no_more(broker: Broker, tmp_path: Path) -> None:
    wish = hostile(
        "box-1",
        x509.BasicConstraints(ca=True, path_length=None),
        x509.SubjectAlternativeName([x509.DNSName("_hub"), x509.DNSName("localhost")]),
    )
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle()
        answer = await _answer(hub, bundle, Claim(bundle.token, "box-1", wish, "i"))
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


async def test_what_is_no_claim_is_dropped_and_the_next_is_answered(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle()
        good = Claim(bundle.token, "box-1", hostile(), "i")
        bad = [
            b"",
            b"[" * 50_000,
            b"\xff" * 100,
            b"{}",
            b"x" * 70_000,
            msgspec.json.encode({**msgspec.to_builtins(good), "device": "Box/1"}),
            msgspec.json.encode({**msgspec.to_builtins(good), "request": "x" * 20_000}),
            msgspec.json.encode({**msgspec.to_builtins(good), "facts": {"x": "y" * 5000}}),
        ]
        async with Peer(broker.options(CLAIM_NAME), f"{CLAIM_ANSWER}/+") as peer:
            for payload in bad:
                await peer.link.publish(Message(f"{CLAIM_REQUEST}/bad", payload))
            await peer.link.publish(Message(f"{CLAIM_REQUEST}/b-d", msgspec.json.encode(good)))
            await peer.link.publish(Message(f"{CLAIM_REQUEST}/good", msgspec.json.encode(good)))
            assert (await peer.next()).topic == f"{CLAIM_ANSWER}/good"
        assert hub.states() == [("box-1", "issued")]


async def test_a_certificate_for_another_key_is_not_taken(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle(allowed=3)
        other = broker.authority.device("box-1", new_request("box-1")[1], time.time())

        async def answer(message: Message) -> None:
            wrong = ClaimAnswer("issued", certificate=other.decode())
            nonce = message.topic.rpartition("/")[2]
            await hub.link.publish(Message(f"{CLAIM_ANSWER}/{nonce}", msgspec.json.encode(wrong)))

        hub.part.claim = answer  # type: ignore[method-assign]
        with pytest.raises(InvalidRequestError, match="not for this private key"):
            await become(tmp_path / "box", "box-1", bundle)
    assert IdentityFolder(tmp_path / "box").identity() is None


async def test_a_box_that_is_enrolled_already_is_not_enrolled_over(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        bundle = hub.bundle(allowed=2)
        await become(tmp_path / "box", "box-1", bundle)
    before = contents(tmp_path / "box")
    folder = IdentityFolder(tmp_path / "box")
    assert begin(folder, "box-1", bundle) is None
    with pytest.raises(ConflictError, match="is 'box-1' at localhost"):
        begin(folder, "box-2", bundle)
    assert contents(tmp_path / "box") == before
    folder.leave()
    assert sorted(contents(tmp_path / "box")) == ["instance"]
    with pytest.raises(NotFoundError):
        folder.leave()


async def test_a_device_renews_and_the_same_question_gets_the_same_certificate(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        await become(tmp_path / "box", "box-1", hub.bundle())
        question = Question("renew", body=hostile("box-1"))
        first = await hub.part.renew("box-1", question)
        assert first.ok
        assert (await hub.part.renew("box-1", question)).data == first.data
        assert certificate_facts(first.data).common_name == "box-1"
        assert len(hub.enrolments.certificates("box-1")) == 2
        assert not (await hub.part.renew("box-1", Question("renew", body=hostile("box-2")))).ok
        assert not (await hub.part.renew("box-1", Question("renew", body="x"))).ok
        hub.enrolments.revoke("box-1", actor="ann", now=time.time())
        refused = await hub.part.renew("box-1", Question("renew", body=hostile("box-1")))
        assert (refused.ok, refused.code, refused.data) == (False, "not_approved", b"")


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    with pytest.raises(NotFoundError):
        read_bundle(path, now=0)
    for content in (b"", b"{}", b"[" * 100_000, b"\xff"):
        path.write_bytes(content)
        with pytest.raises(InvalidRequestError, match="no claim bundle"):
            read_bundle(path, now=0)
    path.write_bytes(msgspec.json.encode(ClaimBundle("t", "c", "a", "h", 1, expires=5.0)))
    assert read_bundle(path, now=4.0).host == "h"
    with pytest.raises(InvalidRequestError, match="expired"):
        read_bundle(path, now=5.0)


async def test_a_box_whose_certificate_ran_out_is_let_in_again_by_a_person(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path, EnrolmentRules(certificate_days=1)) as hub:
        bundle = hub.bundle(allowed=5)
        folder = IdentityFolder(tmp_path / "box")
        claim = Claim(bundle.token, "box-1", new_request("box-1")[1].decode(), folder.instance())
        first = await _answer(hub, bundle, claim)
        hub.enrolments._database.write_blocking(
            lambda connection: connection.execute("UPDATE certificates SET expires = 1.0") and None
        )
        waiting = await _answer(hub, bundle, claim)
        assert (waiting.status, hub.states()) == ("waiting", [("box-1", "waiting")])
        hub.enrolments.approve("box-1", actor="ann", now=time.time())
        again = await _answer(hub, bundle, claim)
        assert (again.status, again.certificate != first.certificate) == ("issued", True)


async def test_the_brokers_list_follows_the_database_whoever_changed_it(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, tmp_path) as hub:
        await become(tmp_path / "box", "box-1", hub.bundle())
        files = replace(HubFiles.of(HubSettings(data_dir=tmp_path)), revoked=broker.files.revoked)
        revocations = Revocations(hub.enrolments, broker.authority, files, SystemClock())
        assert not revocations.refresh(), "nobody is revoked"
        broker.files.revoked.write_bytes(b"torn")
        assert revocations.refresh(), "the broker could not start with it"
        [serial] = hub.enrolments.revoke("box-1", actor="ann", now=time.time())
        assert revocations.refresh()
        assert revoked_serials(broker.files.revoked.read_bytes()) == {int(serial, 16)}
        assert not revocations.refresh(), "once is enough"


@pytest.mark.slow
async def test_boxes_that_share_a_bundle_push_each_other_off_and_are_all_enrolled(
    broker: Broker, tmp_path: Path
) -> None:
    async with running(broker, tmp_path, deadline_s=300.0) as hub:
        bundle = hub.bundle(allowed=20)
        async with asyncio.TaskGroup() as tasks:
            for n in range(20):
                tasks.create_task(become(tmp_path / f"{n}", f"box-{n:02}", bundle, pauses=Pauses(0.2, 6.0)))
        assert sorted(hub.states()) == [(f"box-{n:02}", "issued") for n in range(20)]
        assert [each.used for each in hub.enrolments.claims()] == [20]
