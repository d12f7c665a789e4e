"""Rollouts in the database: what counts once, who wins a race, and what a kill leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.fleet import Answer, DeviceState, Job, JobReport, Question, Reported
from appliance.core.messaging import Message
from appliance.hub.device_store import SqliteDevices
from appliance.hub.key_watch import KeyWatch
from appliance.hub.rollout_policy import Decision, Plan, Progress, started
from appliance.hub.rollout_records import Audience, Options, Rollout
from appliance.hub.rollout_store import SqliteRollouts
from appliance.hub.rollouts import NEWCOMERS_EVERY_S, Rollouts, job_maker
from appliance.hub.schema import MIGRATIONS
from appliance.store.database import Database
from appliance.store.grouped import GroupedWrites

pytestmark = pytest.mark.anyio


class Fleet:
    """A hub's rollouts without a broker: what would be published is kept.

    Attributes:
        now: The clock.
        published: Messages, oldest first.
        connected: Whether there is a broker.
        key: Id of the key that signs.
    """

    def __init__(self, database: Database) -> None:
        self.now = 1_800_000_000.0
        self.published: list[Message] = []
        self.refused: list[tuple[str, ...]] = []
        self.connected = True
        writes = GroupedWrites(database)
        self.devices = SqliteDevices(database, writes, SystemClock())
        self.store = SqliteRollouts(database, writes, job_maker(self.devices, self))
        self.part = self.new_part()
        self.database = database
        self.key = "first"
        self.keys = KeyWatch(database, self.key_id)

    def new_part(self) -> Rollouts:
        return Rollouts(self.store, self.devices, self, self, self, complaints=cast("Any", self))

    def sign(self, document: bytes, _: str) -> bytes:
        return document

    def key_id(self) -> str:
        return self.key

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now

    async def publish(self, message: Message) -> None:
        self.published.append(message)

    def refuse(self, *what: str) -> None:
        self.refused.append(what)

    async def add(self, count: int, *, hardware: str = "x86", first: int = 0) -> None:
        """Let devices be known and online."""
        for n in range(first, first + count):
            state = DeviceState(1, "online", 0.0, "1", "i")
            await self.devices.note_state(f"box-{n}", state, retained=False)
            reported = Reported(1, 0, facts={"hardware": hardware, "utc_offset_s": 3600})
            await self.devices.note_report(f"box-{n}", reported, msgspec.json.encode(reported), retained=False)

    def begin(self, name: str = "r-1", model: str = "m", **changes: Any) -> Rollout:
        plan = Plan(soak_s=10.0, patience_s=1000.0)
        rollout = Rollout(
            id=name,
            model=model,
            release=f"{model}:2",
            target=f"releases/{model}/2/release.json",
            length=10,
            digest="0" * 64,
            counter=2,
            audience=Audience(),
            options=Options(),
            plan=plan,
            progress=Progress(),
            attempt=1,
            created=self.now,
            actor="ann",
        )
        rollout = replace(rollout, **changes)
        self.store.begin(rollout)
        return rollout

    async def turn(self, seconds: float = 1.0) -> None:
        """Let the hub work until it would wait."""
        self.now += seconds
        for _ in range(20):
            busy = False
            for rollout in self.store.unfinished():
                busy |= await self.part.advance(rollout)
            for rollout in self.store.open_to_newcomers():
                await self.part.welcome(rollout)
            await self.part._remind()
            busy |= await self.part.send() > 0
            if not busy:
                return
        raise AssertionError("it never rests")

    def jobs(self) -> dict[str, Job]:
        """Return the newest job of each device, and take them."""
        jobs: dict[str, Job] = {}
        for message in self.published:
            if message.topic.endswith("/job"):
                job = msgspec.json.decode(message.payload, type=Job)
                assert message.retain
                assert job.device not in jobs or job.version > jobs[job.device].version or job == jobs[job.device]
                jobs[job.device] = job
        self.published.clear()
        return jobs

    async def say(self, job: Job, state: Any, sequence: int = 1, **changes: Any) -> None:
        report = JobReport(job.id, job.version, 1, sequence, state, **changes)
        message = Message(f"ea/1/up/{job.device}/job/{job.id}", msgspec.json.encode(report))
        await self.part.handle(job.device, "job", job.id, message)

    def states(self, rollout: str = "r-1") -> dict[str, str]:
        return {each.device: each.state for each in self.store.members(rollout)}

    def steps(self, rollout: str = "r-1") -> list[str]:
        return [each.step for each in self.store.timeline(rollout)]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with closing(Database(tmp_path / "hub.db", migrations=MIGRATIONS)) as database:
        yield Fleet(database)


@pytest.fixture(autouse=True)
async def _first_key(fleet: Fleet) -> None:
    assert await fleet.keys.look()


async def test_jobs_are_sent_again_under_a_new_key_even_those_that_were_being_sent(fleet: Fleet) -> None:
    await fleet.add(3)
    fleet.begin(plan=Plan(canary_least=2))
    await fleet.turn()
    before = fleet.jobs()
    assert len(before) == 2
    assert not await fleet.keys.look(), "nothing has changed"
    fleet.key = "second"
    assert await fleet.keys.look()
    [waiting, _] = fleet.store.to_send(10)
    await fleet.store.sent({waiting.device: waiting.version}, fleet.now, "first")
    await fleet.turn()
    assert fleet.jobs() == before, "the same jobs, each once"
    await fleet.turn()
    assert fleet.jobs() == {}


async def test_a_rollout_goes_through_its_waves_to_everyone(fleet: Fleet) -> None:
    await fleet.add(40)
    fleet.begin()
    sizes = []
    for _ in range(4):
        await fleet.turn()
        jobs = fleet.jobs()
        sizes.append(len(jobs))
        for job in jobs.values():
            assert (job.action, job.counter, job.version, job.not_before) == ("install", 2, 1, 0.0)
            await fleet.say(job, "fetching", percent=50)
            await fleet.say(job, "confirmed", 2)
        await fleet.turn()
        await fleet.turn(10.0)
    assert sizes == [2, 2, 16, 20]
    await fleet.turn(10.0)
    assert fleet.store.find("r-1").progress.state == "completed"
    assert set(fleet.states().values()) == {"succeeded"}
    assert fleet.steps()[:3] == ["begin", "wave 0: 2 devices", "soak"]
    assert fleet.steps()[-1] == "complete"
    assert all(each.reason for each in fleet.store.timeline("r-1"))


async def completed(fleet: Fleet, count: int) -> None:
    """Bring a release to some devices, to the end."""
    await fleet.add(count)
    fleet.begin(plan=Plan(canary_share=1.0, soak_s=0.0, shares=(), tolerated_share=0.5))
    await fleet.turn()
    for job in fleet.jobs().values():
        await fleet.say(job, "confirmed")
    await fleet.turn()
    assert fleet.store.find("r-1").progress.state == "completed"


async def test_devices_that_come_after_the_end_get_the_release_too(fleet: Fleet) -> None:
    await completed(fleet, 3)
    await fleet.add(2, first=3)
    await fleet.turn(NEWCOMERS_EVERY_S)
    jobs = fleet.jobs()
    assert set(jobs) == {"box-3", "box-4"}, "nobody has it twice"
    assert {each.action for each in jobs.values()} == {"install"}
    for job in jobs.values():
        await fleet.say(job, "confirmed")
    await fleet.turn(NEWCOMERS_EVERY_S)
    assert set(fleet.states().values()) == {"succeeded"}
    assert len(fleet.states()) == 5
    assert fleet.store.find("r-1").progress.state == "completed"
    assert fleet.store.timeline("r-1")[-1].reason == "They came after the end."


async def test_devices_that_come_later_are_left_alone_once_too_many_of_them_fail(fleet: Fleet) -> None:
    await completed(fleet, 3)
    await fleet.add(3, first=3)
    await fleet.turn(NEWCOMERS_EVERY_S)
    for job in fleet.jobs().values():
        await fleet.say(job, "failed", code="out_of_memory")
    await fleet.add(1, first=6)
    for _ in range(3):
        await fleet.turn(NEWCOMERS_EVERY_S)
    assert fleet.jobs() == {}
    assert "box-6" not in fleet.states()
    assert (fleet.store.find("r-1").progress.state, fleet.steps()[-1]) == ("completed", "close")
    assert fleet.steps().count("close") == 1


async def test_a_release_that_was_followed_withdrawn_or_ended_reaches_nobody_more(fleet: Fleet) -> None:
    await completed(fleet, 2)
    open_now = fleet.store.open_to_newcomers
    assert [each.id for each in open_now()] == ["r-1"]
    fleet.begin("r-2")
    assert open_now() == [], "whoever comes joins the one under way"
    fleet.store.change("r-2", "abort", actor="ann", now=fleet.now)
    assert [each.id for each in open_now()] == ["r-1"], "what was aborted is not what the fleet should have"
    fleet.begin("r-3", progress=Progress("completed", 0))
    assert [each.id for each in open_now()] == ["r-3"]
    release = "INSERT INTO releases (model, counter, version, target, length, digest, document, withdrawn) "
    values = "VALUES ('m', 2, '2', 'releases/m/2/release.json', 1, ?, x'7b7d', 1.0)"
    fleet.database.write_blocking(lambda c: c.execute(release + values, ("0" * 64,)) and None)
    assert open_now() == []
    fleet.begin("r-4", "n", target="releases/n/2/release.json", progress=Progress("completed", 0))
    fleet.store.change("r-4", "abort", actor="ann", now=fleet.now)
    assert open_now() == []


async def test_a_device_that_was_removed_or_set_up_anew_gets_its_releases_again(fleet: Fleet) -> None:
    await completed(fleet, 2)
    await fleet.devices.forget("box-0", actor="ann")
    assert set(fleet.states()) == {"box-1"}
    await fleet.devices.note_state("box-0", DeviceState(1, "online", 1.0, "1", "new"), retained=False)
    assert await fleet.devices.note_state("box-1", DeviceState(1, "online", 1.0, "1", "new"), retained=False) == "moved"
    await fleet.turn(NEWCOMERS_EVERY_S)
    jobs = fleet.jobs()
    assert {name: job.version for name, job in jobs.items()} == {"box-0": 2, "box-1": 2}
    for job in jobs.values():
        await fleet.say(job, "confirmed")
    assert set(fleet.states().values()) == {"succeeded"}


async def test_a_removed_device_is_sent_no_job_any_more(fleet: Fleet) -> None:
    await fleet.add(2)
    fleet.begin()
    await fleet.turn()
    assert len(fleet.jobs()) == 2
    await fleet.devices.forget("box-0", actor="ann")
    await fleet.store.send_again(None, before=fleet.now + 1)
    fleet.key = "second"
    assert await fleet.keys.look()
    await fleet.turn()
    assert set(fleet.jobs()) == {"box-1"}


async def test_a_failed_canary_pauses_and_a_person_goes_on_or_retries(fleet: Fleet) -> None:
    await fleet.add(40)
    fleet.begin()
    await fleet.turn()
    good, bad = fleet.jobs().values()
    await fleet.say(good, "confirmed")
    await fleet.say(bad, "rolled_back", code="soak_errors", detail="3 of 9 requests failed")
    for _ in range(5):
        await fleet.turn(1_000_000.0)
    assert fleet.jobs() == {}, "nobody else is touched"
    found = fleet.store.find("r-1")
    assert (found.progress.state, found.progress.code) == ("paused", "canary_failed")
    member = next(each for each in fleet.store.members("r-1") if each.device == bad.device)
    assert (member.state, member.code) == ("failed", "soak_errors")
    fleet.store.change("r-1", "retry", actor="ann", now=fleet.now)
    await fleet.turn()
    again = fleet.jobs()[bad.device]
    assert (again.version, again.force, again.id != bad.id) == (2, True, True)
    await fleet.say(bad, "failed", 2)
    assert fleet.states()[bad.device] == "sent", "a report of the attempt before says nothing of this one"
    await fleet.say(again, "confirmed", 3)
    await fleet.turn()
    await fleet.turn(10.0)
    assert len(fleet.jobs()) == 2, "the next wave"


async def test_of_ten_thousand_devices_only_a_failing_canary_wave_is_ever_touched(fleet: Fleet) -> None:
    fleet.database.write_blocking(
        lambda c: (
            c.executemany(
                "INSERT INTO devices (id, created, status, instance, epoch, began, confirmed, agent, hardware) "
                "VALUES (?, 0, 'online', 'i', 1, 0, 0, '1', ?)",
                [(f"d-{n}", f"class-{n % 5}") for n in range(10_000)],
            )
            and None
        )
    )
    fleet.begin(plan=Plan())
    await fleet.turn()
    jobs = list(fleet.jobs().values())
    assert len(jobs) == 100
    for job in jobs[1:]:
        await fleet.say(job, "confirmed")
    await fleet.say(jobs[0], "rolled_back")
    for _ in range(10):
        await fleet.turn(86_400.0)
    assert fleet.store.find("r-1").progress.state == "paused"
    assert fleet.jobs() == {}
    assert len(fleet.states()) == 100
    given = fleet.database.read(lambda c: c.execute("SELECT count(*) FROM device_jobs").fetchone()[0])
    assert given == 100
    assert fleet.steps() == ["begin", "wave 0: 100 devices", "pause"]


async def test_too_many_failures_cancel_those_in_flight_and_abort_recalls_the_others(fleet: Fleet) -> None:
    await fleet.add(20)
    fleet.begin(plan=Plan(canary_share=1.0, soak_s=10.0))
    await fleet.turn()
    jobs = list(fleet.jobs().values())
    await fleet.say(jobs[0], "confirmed")
    await fleet.say(jobs[1], "fetching")
    for job in jobs[2:5]:
        await fleet.say(job, "failed")
    await fleet.turn()
    assert fleet.store.find("r-1").progress.state == "failed"
    canceled = fleet.jobs()
    assert set(canceled) == {each.device for each in [jobs[1], *jobs[5:]]}
    assert {(each.action, each.version) for each in canceled.values()} == {("cancel", 2)}
    await fleet.say(jobs[5], "confirmed")
    assert fleet.states()[jobs[5].device] == "succeeded", "success crossed the cancellation"
    fleet.store.change("r-1", "recall", actor="ann", now=fleet.now, reason="bad answers")
    await fleet.turn()
    recalled = fleet.jobs()
    assert set(recalled) == {jobs[0].device, jobs[5].device}
    assert {each.action for each in recalled.values()} == {"recall"}
    await fleet.say(recalled[jobs[0].device], "rolled_back", 2)
    assert fleet.states()[jobs[0].device] == "recalled"
    await fleet.say(recalled[jobs[5].device], "rejected", 2)
    assert fleet.states()[jobs[5].device] == "failed"
    assert "bad answers" in [each.reason for each in fleet.store.timeline("r-1")]


async def test_a_report_counts_once_and_only_for_a_job_that_was_given(fleet: Fleet) -> None:
    await fleet.add(2)
    fleet.begin()
    await fleet.turn()
    job = fleet.jobs()["box-0"]
    for _ in range(3):
        await fleet.say(job, "failed", 7)
    acks = [each for each in fleet.published if each.topic == "ea/1/dn/box-0/ack"]
    assert len(acks) == 3, "each is acknowledged, or the device would repeat it for ever"
    assert b'"up_to":7' in acks[0].payload
    kept = fleet.database.read(lambda c: c.execute("SELECT count(*) FROM job_reports").fetchone()[0])
    assert kept == 1
    await fleet.say(replace_job(job, "r-9.1"), "confirmed", 8)
    await fleet.say(replace_job(job, job.id, device="box-77"), "confirmed", 1)
    kept = fleet.database.read(lambda c: c.execute("SELECT count(*) FROM job_reports").fetchone()[0])
    assert (kept, fleet.states()["box-0"]) == (1, "failed")


def replace_job(job: Job, name: str, **changes: Any) -> Job:
    return msgspec.structs.replace(job, id=name, **changes)


@pytest.mark.parametrize("payload", [b"", b"{}", b"[" * 60_000, b"\xff", b"x" * 70_000])
async def test_what_is_no_report_is_refused_and_changes_nothing(fleet: Fleet, payload: bytes) -> None:
    await fleet.add(2)
    fleet.begin()
    await fleet.turn()
    before = fleet.states()
    fleet.jobs()
    await fleet.part.handle("box-0", "job", "r-1.1", Message("ea/1/up/box-0/job/r-1.1", payload))
    report = msgspec.json.encode(JobReport("r-1.1", 1, 1, 1, "confirmed"))
    await fleet.part.handle("box-0", "job", "r-2.1", Message("ea/1/up/box-0/job/r-2.1", report))
    await fleet.part.handle("box-0", "job", "r-1.1", Message("ea/1/up/box-0/job/r-1.1", report, retain=True))
    assert fleet.states() == before
    assert len(fleet.refused) == 3
    assert fleet.published == []


async def test_two_rollouts_of_one_model_do_not_race(fleet: Fleet) -> None:
    await fleet.add(4)
    fleet.begin()
    with pytest.raises(ConflictError, match="r-1 of m is running"):
        fleet.begin("r-2")
    with pytest.raises(NotFoundError):
        fleet.store.find("r-2")


async def test_a_device_has_one_job_at_a_time_and_takes_the_next_when_it_is_done(fleet: Fleet) -> None:
    await fleet.add(2)
    fleet.begin("r-1", "m")
    fleet.begin("r-2", "n")
    await fleet.turn()
    first = fleet.jobs()
    assert {each.id for each in first.values()} == {"r-1.1"}
    assert set(fleet.states("r-2").values()) == {"queued"}
    await fleet.say(first["box-0"], "confirmed")
    await fleet.turn()
    second = fleet.jobs()
    assert {name: (each.id, each.version) for name, each in second.items()} == {"box-0": ("r-2.1", 2)}
    assert fleet.states("r-2") == {"box-0": "sent", "box-1": "queued"}


async def test_of_two_hubs_that_decide_at_once_one_wins(fleet: Fleet) -> None:
    await fleet.add(10)
    before = fleet.begin()
    decision, progress = Decision("start", "go"), started(before.progress, fleet.now)
    assert await fleet.store.settle(before, progress, decision, ["box-1", "box-2"], fleet.now)
    assert not await fleet.store.settle(before, progress, decision, ["box-3", "box-4"], fleet.now)
    assert set(fleet.states()) == {"box-1", "box-2"}
    assert fleet.steps() == ["begin", "wave 0: 2 devices"]


async def test_a_hub_that_dies_after_any_step_loses_and_doubles_no_job(fleet: Fleet) -> None:
    await fleet.add(200)
    fleet.begin(plan=Plan(canary_share=1.0))
    given: dict[str, set[int]] = {}
    for step in range(12):
        part = fleet.new_part()  # whatever the one before had in its memory is gone
        if step % 3 == 0:
            await part.advance(fleet.store.find("r-1"))
        elif step % 3 == 1:
            await part.send()
        else:  # published, and killed before it was noted
            for each in fleet.store.to_send(10):
                await part._send(each)
        for name, job in fleet.jobs().items():
            given.setdefault(name, set()).add(job.version)
    await fleet.turn()
    for name, job in fleet.jobs().items():
        given.setdefault(name, set()).add(job.version)
    assert given == {f"box-{n}": {1} for n in range(200)}, "each once, in one version"
    assert set(fleet.states().values()) == {"sent"}


async def test_a_job_that_the_broker_forgot_is_sent_again(fleet: Fleet) -> None:
    await fleet.add(2)
    fleet.begin()
    await fleet.turn()
    before = fleet.jobs()
    await fleet.turn()
    assert fleet.jobs() == {}
    fleet.connected = False
    await fleet.turn()
    fleet.connected = True
    await fleet.turn()
    assert fleet.jobs() == before
    fleet.part.note_report("box-1", Reported(2, 0))
    await fleet.turn(61.0)
    assert fleet.jobs() == {"box-1": before["box-1"]}
    await fleet.say(before["box-1"], "confirmed")
    fleet.jobs()
    fleet.part.note_report("box-1", Reported(3, 0))
    await fleet.turn(61.0)
    assert fleet.jobs() == {}, "it is done"


async def test_a_hub_restored_from_a_backup_overtakes_what_its_devices_know(fleet: Fleet) -> None:
    await fleet.add(2)
    fleet.begin()
    await fleet.turn()
    job = fleet.jobs()["box-0"]
    lost = msgspec.structs.replace(job, id="r-0.1", version=7)  # of a rollout after the backup
    await fleet.say(lost, "confirmed", 90)
    await fleet.turn()
    again = fleet.jobs()["box-0"]
    assert (again.id, again.version) == (job.id, 8)
    await fleet.say(again, "confirmed", 91)
    assert fleet.states()["box-0"] == "succeeded"
    await fleet.say(msgspec.structs.replace(job, version=2**53), "confirmed", 92)
    await fleet.turn()
    assert fleet.jobs() == {}, "a made-up version counts for nothing"


async def test_a_device_that_asks_is_told_its_job(fleet: Fleet) -> None:
    await fleet.add(2)
    with pytest.raises(NotFoundError):
        await fleet.part.answer("box-0", Question("job"))
    fleet.begin()
    await fleet.turn()
    answer = await fleet.part.answer("box-0", Question("job"))
    assert isinstance(answer, Answer)
    assert msgspec.json.decode(answer.data, type=Job) == fleet.jobs()["box-0"]


async def test_newcomers_join_the_last_wave_and_no_earlier_one(fleet: Fleet) -> None:
    await fleet.add(2)
    fleet.begin(plan=Plan(shares=(1.0,), soak_s=10.0))
    await fleet.turn()
    canaries = fleet.jobs()
    await fleet.add(1, first=50)
    await fleet.turn(70.0)
    assert fleet.jobs() == {}
    for job in canaries.values():
        await fleet.say(job, "confirmed")
    await fleet.turn()
    await fleet.turn(10.0)
    assert set(fleet.jobs()) == {"box-50"}
    await fleet.add(1, first=60)
    await fleet.turn(70.0)
    assert set(fleet.jobs()) == {"box-60"}
    assert fleet.store.members("r-1")[-1].wave == 1


async def test_a_window_opens_by_the_devices_local_time(fleet: Fleet) -> None:
    await fleet.add(2)
    fleet.begin(options=Options(window="01:00-05:00"))
    await fleet.turn()
    job = fleet.jobs()["box-0"]
    local = (job.not_before + 3600) % 86_400
    assert local == 3600.0, "one o'clock where the device is"
    assert job.not_before > fleet.now
    assert job.expires > job.not_before


async def test_a_quarantined_device_and_those_it_is_not_for_are_left_out(fleet: Fleet) -> None:
    await fleet.add(4)
    fleet.database.write_blocking(
        lambda c: c.execute("UPDATE devices SET quarantined = 1.0 WHERE id = 'box-1'") and None
    )
    fleet.begin(audience=Audience(devices=("box-1", "box-2")))
    await fleet.turn()
    assert set(fleet.jobs()) == {"box-2"}


async def test_what_a_person_says_in_the_wrong_state_is_refused(fleet: Fleet) -> None:
    fleet.begin()
    with pytest.raises(ConflictError, match="is running"):
        fleet.store.change("r-1", "resume", actor="ann", now=0.0)
    assert fleet.steps() == ["begin"]
