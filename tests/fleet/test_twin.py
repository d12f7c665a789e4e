"""The desired twin is verified, kept, applied and reported; a hostile one changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.errors import NotFoundError, UnavailableError, UntrustedError
from appliance.core.fleet import LARGEST_DOCUMENT_BYTES, Desired, Reported, ReportedModel, down
from appliance.core.messaging import Message
from appliance.core.releases import DESIRED_TYPE, JOB_TYPE, Criteria
from appliance.core.settings import load_settings
from appliance.core.wishes import Soak, Wish
from appliance.fleet.schema import open_fleet_database
from appliance.fleet.twin import Twin, TwinEffects, local_settings
from appliance.fleet.twin_policy import overlay
from appliance.fleet.twin_store import TwinStore, stored_desired
from appliance.observe.metrics import Metrics
from appliance.security.envelopes import open_envelope, seal
from appliance.security.signing import SigningKey, make_key
from appliance.store.database import Database
from tests.fleet.links import KeptLink, until

pytestmark = pytest.mark.anyio

HUB, STRANGER = make_key(), make_key()


class Versions:
    """Model wishes as the box keeps them, without a box."""

    def __init__(self) -> None:
        self.kept: dict[str, Wish] = {}
        self.asked: list[str] = []

    def wish(self, name: str) -> Wish | None:
        return self.kept.get(name)

    def put(self, name: str, version: str, state: Any = "confirmed", *, origin: str = "cli", reason: str = "") -> Wish:
        self.kept[name] = Wish(name, version, None, state, reason, "", 0.0, origin)
        return self.kept[name]

    async def activate(self, full_name: str, *, origin: str, soak: Soak | None, criteria: Criteria) -> Wish:
        self.asked.append(full_name)
        name, _, version = full_name.partition(":")
        if name == "absent":
            raise NotFoundError("There is no model absent:1.")
        return self.put(name, version, "trial", origin=origin)


class Box:
    """A twin with its surroundings."""

    def __init__(self, database: Database, *, keys: list[SigningKey], flags: Mapping[str, Any] | None = None) -> None:
        settings, effective = load_settings(flags=flags, environment={})
        if (kept := TwinStore(database).desired()) is not None:
            effective = overlay(settings, effective, kept)
        self.link = KeptLink()
        self.keys = keys
        self.levels: list[str] = []
        self.rates: list[Mapping[str, float]] = []
        self.versions = Versions()
        self.models: list[ReportedModel] = []
        self.metrics = Metrics()
        self.store = TwinStore(database)
        self.twin = Twin(
            "box",
            self.link,
            self.store,
            local_settings(effective),
            opened=self.opened,
            effects=TwinEffects(
                self.levels.append,
                self.set_rates,
                self.versions,  # type: ignore[arg-type]
                lambda: list(self.models),
                self.facts,
            ),
            metrics=self.metrics.fleet,
        )

    async def opened(self, envelope: bytes) -> Desired:
        """Verify as `fleet.trust` does, which has its own tests with a whole repository."""
        if not self.keys:
            raise UnavailableError("The hub is away, and its keys were never read.")
        payload = open_envelope(envelope, DESIRED_TYPE, [each.public for each in self.keys])
        try:
            return msgspec.json.decode(payload, type=Desired)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UntrustedError(f"none: {error}") from error

    def set_rates(self, rates: Mapping[str, float]) -> Mapping[str, str]:
        self.rates.append(rates)
        return {name: "too seldom" for name, rate in rates.items() if rate > 3600}

    async def facts(self) -> dict[str, Any]:
        return {"hardware": "x86-64-avx2"}

    @property
    def reports(self) -> list[Reported]:
        return [msgspec.json.decode(each.payload, type=Reported) for each in self.link.sent]

    async def send(self, payload: bytes) -> None:
        await self.twin.handle("des", Message(down("box", "des"), payload, retain=True))

    async def take(self, payload: bytes) -> None:
        """Send a document and wait until it is on the disk."""
        async with self.running():
            await self.send(payload)
            await until(self.store.desired)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(self.twin.run())
            yield
            running.cancel()


FIRST = {"log_level": "debug", "queue_size": 5, "colour": 1}


def signed(document: Desired | bytes, *, key: SigningKey = HUB, kind: str = DESIRED_TYPE) -> bytes:
    return seal(document if isinstance(document, bytes) else msgspec.json.encode(document), kind, [key])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = open_fleet_database(path)
    yield database
    database.close()


async def test_a_signed_document_is_kept_applied_and_reported(database: Database) -> None:
    box = Box(database, keys=[HUB])
    async with box.running():
        await box.link.wait_for(1)
        await box.send(signed(Desired("box", 3, FIRST, {"health": 60, "job": 7200}, {"chat": "7"})))
        await box.link.wait_for(2)
    before, after = box.reports
    assert (before.desired_version, after.desired_version) == (0, 3)
    assert after.version == before.version + 1
    assert box.levels == ["debug"]
    assert box.rates[-1] == {"health": 60, "job": 7200}
    assert box.versions.asked == ["chat:7"]
    assert after.settings["log_level"] == "debug"
    assert after.settings["queue_size"] == 64, "what is in force"
    assert after.pending == ["queue_size"]
    assert after.refused == {"colour": "this version has no such setting", "telemetry.job": "too seldom"}
    assert after.facts == {"hardware": "x86-64-avx2"}
    assert all(each.retain and each.topic == "ea/1/up/box/rep" for each in box.link.sent)


async def test_what_was_accepted_holds_after_a_restart_without_a_hub(database: Database, path: Path) -> None:
    wanted = Desired("box", 3, {"log_level": "error", "queue_size": 5}, {"health": 60}, {"chat": "7"})
    await TwinStore(database).accept(wanted)  # and the power went before anything was done of it
    again = Box(database, keys=[])
    again.link.connected = False
    assert again.twin._local.in_force["queue_size"] == 5
    assert stored_desired(path) == wanted
    async with again.running():
        await until(lambda: again.versions.asked)
    assert again.rates == [{"health": 60}]
    assert again.levels == [], "it started with that level"


async def test_what_the_hub_takes_back_is_the_boxs_own_again(database: Database) -> None:
    await Box(database, keys=[HUB]).take(signed(Desired("box", 1, {"log_level": "error", "queue_size": 5})))
    box = Box(database, keys=[HUB])
    async with box.running():
        await box.link.wait_for(1)
        await box.send(signed(Desired("box", 2)))
        await box.link.wait_for(2)
    assert box.levels == ["info"]
    assert box.reports[0].pending == []
    assert box.reports[1].pending == ["queue_size"]


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(lambda: signed(Desired("other", 9, {"log_level": "debug"})), id="another device's"),
        pytest.param(lambda: signed(Desired("box", 4, {"log_level": "debug"})), id="older"),
        pytest.param(lambda: signed(Desired("box", 5, {"log_level": "debug"})), id="same version, other contents"),
        pytest.param(lambda: signed(Desired("box", 9, {"log_level": "debug"}), key=STRANGER), id="a stranger's"),
        pytest.param(lambda: signed(Desired("box", 9, {"log_level": "debug"}), kind=JOB_TYPE), id="signed as a job"),
        pytest.param(lambda: msgspec.json.encode(Desired("box", 9, {"log_level": "debug"})), id="unsigned"),
        pytest.param(
            lambda: signed(Desired("box", 9, {"log_level": "debug"})).replace(b'"payload":"', b'"payload":"A', 1),
            id="changed on the way",
        ),
        pytest.param(lambda: signed(Desired("box", 9, {"x": "y" * (LARGEST_DOCUMENT_BYTES + 8192)})), id="giant"),
        pytest.param(lambda: b"x" * 10_000_000, id="giant and none"),
        pytest.param(lambda: signed(b"[" * 60_000), id="deep"),
        pytest.param(lambda: signed(b'{"device":"box","version":-1}'), id="a version below zero"),
        pytest.param(lambda: signed(b"\xff"), id="no text"),
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"null", id="null"),
    ],
)
async def test_a_hostile_document_changes_nothing(database: Database, attack: Any) -> None:
    box = Box(database, keys=[HUB])
    accepted = Desired("box", 5, {"log_level": "warning", "queue_size": 5})
    async with box.running():
        await box.send(signed(accepted))
        await until(lambda: box.reports and box.reports[-1].desired_version == 5)
        n = len(box.reports)
        await box.send(attack())
        box.twin.report_again()
        await box.link.wait_for(n + 1)
    assert box.store.desired() == accepted
    assert box.levels == ["warning"]
    before, after = box.reports[-2:]
    assert msgspec.structs.replace(before, version=0) == msgspec.structs.replace(after, version=0)


async def test_the_same_document_again_is_not_news(database: Database) -> None:
    box = Box(database, keys=[HUB])
    document = signed(Desired("box", 5, {"log_level": "warning"}))
    await box.take(document)
    async with box.running():
        await box.send(document)
        box.link.sent.clear()
        box.twin.report_again()
        await box.link.wait_for(1)
    rendered = box.metrics.render()
    assert b'appliance_fleet_desired_total{outcome="applied"} 1.0' in rendered
    assert b'appliance_fleet_desired_total{outcome="refused"} 0.0' in rendered


async def test_a_document_that_came_before_its_key_is_looked_at_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.fleet.twin.LOOK_AGAIN_S", 0.01)
    box = Box(database, keys=[])
    async with box.running():
        await box.link.wait_for(1)
        await box.send(signed(Desired("box", 1)))
        assert box.store.desired() is None
        box.keys.append(HUB)
        await box.link.wait_for(2)
    assert box.store.desired() == Desired("box", 1)


async def test_a_technicians_flag_wins_and_the_hub_hears_of_it(database: Database) -> None:
    box = Box(database, keys=[HUB], flags={"log_level": "error"})
    async with box.running():
        await box.send(signed(Desired("box", 1, {"log_level": "debug"})))
        await until(lambda: box.reports and box.reports[-1].desired_version == 1)
    assert box.levels == []
    assert box.reports[-1].refused == {"log_level": "it is set on the box by flag --log-level, which wins"}


async def test_a_model_wish_is_handed_on_once_and_what_moves_the_name_afterwards_is_not_fought(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.fleet.twin.LOOK_AGAIN_S", 0.01)
    box = Box(database, keys=[HUB])
    async with box.running():
        await box.send(signed(Desired("box", 1, models={"chat": "7", "absent": "1", "gone": "1", "bad": "2"})))
        await until(lambda: box.store.models_done().keys() == {"chat", "gone", "bad"})
        box.versions.put("chat", "8", origin="job j1")
        box.versions.put("bad", "2", "rolled_back", reason="It crashed twice.")
        del box.versions.kept["gone"]
        refused = {f"models.{each}" for each in ("chat", "absent", "gone", "bad")}
        await until(lambda: box.reports and box.reports[-1].refused.keys() == refused)
    assert [each for each in box.versions.asked if each != "absent:1"] == ["bad:2", "chat:7", "gone:1"]
    assert box.versions.asked.count("absent:1") > 1, "it may be there one day"
    assert box.reports[-1].refused == {
        "models.absent": "There is no model absent:1.",
        "models.bad": "it was tried and rolled back: It crashed twice.",
        "models.chat": "job j1 has wished for version 8 since",
        "models.gone": "the wish for it was withdrawn on the box",
    }
    again = Box(database, keys=[HUB])
    async with again.running():
        await again.link.wait_for(1)
    assert again.versions.asked == ["absent:1"]


async def test_a_report_is_sent_when_something_changed_and_its_version_rises_over_restarts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.fleet.twin.LOOK_AGAIN_S", 0.01)
    box = Box(database, keys=[HUB])
    async with box.running():
        await box.link.wait_for(1)
        await asyncio.sleep(0.1)  # several rounds without news
        assert len(box.link.sent) == 1
        box.models.append(ReportedModel("chat", "1", "gguf", "0" * 64, True))
        await box.link.wait_for(2)
    again = Box(database, keys=[HUB])
    async with again.running():
        await again.link.wait_for(1)
    assert [each.version for each in box.reports + again.reports] == [1, 2, 3]


async def test_a_report_that_could_not_be_sent_is_sent_at_the_next_connecting(database: Database) -> None:
    box = Box(database, keys=[HUB])
    box.link.connected = False
    async with box.running():
        await box.twin.connected()
        await asyncio.sleep(0.02)
        assert box.link.sent == []
        box.link.connected = True
        await box.twin.connected()
        await box.link.wait_for(1)
