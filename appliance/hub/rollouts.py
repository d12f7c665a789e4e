"""Rollouts at work: every second each is judged by the policy, jobs go to the devices, and their reports come back.

    decide ─▶ settle (progress, members, timeline) ─▶ give_jobs (the next version of each device) ─▶ sign ─▶ publish
    report ─▶ kept once ─▶ acknowledged ─▶ the next decision

Each arrow is a transaction, and what is to be done is a row: whoever is killed between two of them goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, NotFoundError, StorageError, UnavailableError
from appliance.core.fleet import (
    LARGEST_DOCUMENT_BYTES,
    Answer,
    Job,
    JobReport,
    Question,
    Reported,
    TelemetryAck,
    UpKind,
    down,
)
from appliance.core.messaging import Link, Message
from appliance.core.releases import JOB_TYPE
from appliance.hub.device_records import DeviceStore, Which
from appliance.hub.dispatch import Complaints
from appliance.hub.http.files import files_url
from appliance.hub.rollout_policy import (
    Candidate,
    Decision,
    Progress,
    choose,
    completed,
    decide,
    soaked,
    started,
    stopped,
    takes_newcomers,
)
from appliance.hub.rollout_records import DeviceJob, JobOf, Rollout
from appliance.hub.rollout_store import SqliteRollouts
from appliance.hub.rollout_window import parse_window
from appliance.hub.twins import Signer

if TYPE_CHECKING:
    from appliance.hub.room import Means

logger = logging.getLogger("appliance.hub")

POLL_S = 1.0
AT_ONCE = 64
GIVEN_AT_ONCE = 500
"""Jobs of one transaction."""
NEWCOMERS_EVERY_S = 60.0
SETTLE_S = 60.0
"""A device that reports its twin so long after its job was sent, and has said nothing of the job, may not have it."""
PROBLEM_S = 30.0
ACK_EXPIRY_S = 60
_PAGE = 1000


class Rollouts:
    """The part of the hub that brings releases to devices."""

    kinds: frozenset[UpKind] = frozenset({"job"})

    def __init__(
        self,
        store: SqliteRollouts,
        devices: DeviceStore,
        link: Link,
        signer: Signer,
        clock: Clock,
        *,
        complaints: Complaints,
    ) -> None:
        self.store = store
        self._devices = devices
        self._link = link
        self._signer = signer
        self._clock = clock
        self._complaints = complaints
        self._there: set[str] = set()
        self._looked: dict[str, float] = {}
        self._was_connected = False

    def note_report(self, device: str, _reported: Reported) -> None:
        """Hear that a device is there: it may have missed its job."""
        self._there.add(device)

    async def answer(self, device: str, _question: Question) -> Answer:
        """Answer a device that asks for its job.

        Raises:
            NotFoundError: It never had one.
        """
        current = self.store.current(device)
        if current is None:
            raise NotFoundError(f"There is no job for {device}.")
        data = self._signer.sign(current.document, JOB_TYPE)
        return Answer(True, data=data, total=len(data), now=self._clock.unix())

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:  # noqa: ARG002
        """Keep a report, and acknowledge it."""
        if message.retain or len(message.payload) > LARGEST_DOCUMENT_BYTES:
            self._complaints.refuse(device, "bad_document", "a report of a job is not retained, and is small")
            return
        try:
            report = _REPORTS.decode(message.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._complaints.refuse(device, "bad_document", f"job: {error}")
            return
        if report.job != rest:
            self._complaints.refuse(device, "bad_document", "a report of a job is on another job's topic")
            return
        await self.store.report(device, report, self._clock.unix())
        ack = TelemetryAck("job", boot=0, up_to=report.sequence)
        try:
            await self._link.publish(
                Message(down(device, "ack"), msgspec.json.encode(ack), qos=0, expiry_s=ACK_EXPIRY_S)
            )
        except UnavailableError as error:  # the device reports again
            logger.info("%s was not told that its report arrived: %s", device, error)

    async def run(self) -> None:
        """Bring rollouts on, for as long as the hub runs."""
        while True:
            busy = False
            try:
                for rollout in self.store.unfinished():
                    busy |= await self.advance(rollout)
                for rollout in self.store.open_to_newcomers():
                    await self.welcome(rollout)
                await self._remind()
                if self._link.connected:
                    busy |= await self.send() > 0
            except ApplianceError as error:
                logger.warning("Rollouts could not go on: %s", error)
                await asyncio.sleep(PROBLEM_S)
            if not busy:
                await asyncio.sleep(POLL_S)

    async def advance(self, rollout: Rollout) -> bool:
        """Judge a rollout and do what follows; return whether there may be more to do at once.

        Raises:
            StorageError: The database failed.
        """
        now = self._clock.unix()
        decision = decide(rollout.plan, rollout.progress, *self.store.tallies(rollout), now)
        progress, joining = await self._follow(rollout, decision, now)
        if decision.action == "wait" and not joining:
            return rollout.progress.state == "running" and await self._give(rollout) > 0
        if joining and decision.action == "wait":
            decision = replace(decision, reason="They came after the last wave had begun.")
        if await self.store.settle(rollout, progress, decision, joining, now):
            logger.info("rollout %s: %s: %s", rollout.id, decision.action, decision.reason)
        return True

    async def welcome(self, rollout: Rollout) -> None:
        """Bring the release of a completed rollout to devices that have come since.

        Raises:
            StorageError: The database failed.
        """
        now = self._clock.unix()
        if not self._is_time_to_look(rollout, now):
            return
        decision = decide(rollout.plan, rollout.progress, *self.store.tallies(rollout), now)
        progress, joining = rollout.progress, list[str]()
        if decision.action == "close":
            progress = stopped(progress, "completed", decision.code)
        elif takes_newcomers(rollout.plan, progress):
            joining = [each.device for each in await self._candidates(rollout)]
        if joining:
            decision = replace(decision, reason="They came after the end.")
        if decision.action == "close" or joining:
            await self.store.settle(rollout, progress, decision, joining, now)
        if takes_newcomers(rollout.plan, progress):
            while await self._give(rollout) == GIVEN_AT_ONCE:
                pass

    async def _follow(self, rollout: Rollout, decision: Decision, now: float) -> tuple[Progress, Sequence[str]]:
        """Return the progress after a decision, and who joins."""
        before = rollout.progress
        if decision.action == "start":
            left = await self._candidates(rollout)
            members = len(self.store.members(rollout.id))
            return started(before, now), choose(rollout.plan, before.wave + 1, members, left, rollout.id)
        if decision.action == "wait":
            return before, await self._newcomers(rollout, now)
        if decision.action == "complete":
            return completed(before, self.store.tallies(rollout)[1]), ()
        if decision.action == "soak":
            return soaked(before, now), ()
        state = {"pause": "paused", "fail": "failed"}[decision.action]
        return stopped(before, state, decision.code), ()  # type: ignore[arg-type]

    async def _newcomers(self, rollout: Rollout, now: float) -> Sequence[str]:
        if not takes_newcomers(rollout.plan, rollout.progress) or not self._is_time_to_look(rollout, now):
            return ()
        return [each.device for each in await self._candidates(rollout)]

    def _is_time_to_look(self, rollout: Rollout, now: float) -> bool:
        if now - self._looked.get(rollout.id, 0.0) < NEWCOMERS_EVERY_S:
            return False
        self._looked[rollout.id] = now
        return True

    async def _candidates(self, rollout: Rollout) -> list[Candidate]:
        """Return the devices that a rollout is for and that are not in it yet."""
        members = {each.device for each in self.store.members(rollout.id)}
        named = set(rollout.audience.devices)
        which = Which(group=rollout.audience.group or None)
        found: list[Candidate] = []
        after = ""
        while page := self._devices.list(which, limit=_PAGE, after=after):
            after = page[-1].id
            await asyncio.sleep(0)  # a page of a large fleet takes a while, and messages wait
            found += [
                Candidate(each.id, each.hardware, each.status == "online")
                for each in page
                if each.quarantined is None and each.id not in members and (not named or each.id in named)
            ]
        return found

    async def _give(self, rollout: Rollout) -> int:
        return await self.store.give_jobs(rollout, most=GIVEN_AT_ONCE)

    async def _remind(self) -> None:
        """Have jobs sent again that the broker may have forgotten: all after a new connection, else of whom we hear."""
        there, self._there = self._there, set()
        connected = self._link.connected
        if connected and not self._was_connected:
            await self.store.send_again(None, before=self._clock.unix())
        elif there:
            await self.store.send_again(sorted(there), before=self._clock.unix() - SETTLE_S)
        self._was_connected = connected

    async def send(self) -> int:
        """Sign and publish jobs that are to be sent; return how many the broker has taken."""
        sent: dict[str, int] = {}
        key = self._signer.key_id()
        waiting = self.store.to_send(AT_ONCE)
        results = await asyncio.gather(*(self._send(each) for each in waiting), return_exceptions=True)
        for job, result in zip(waiting, results, strict=True):
            if result is None:
                sent[job.device] = job.version
            elif not isinstance(result, ApplianceError):
                raise result
            else:
                logger.info("the job of %s was not sent: %s", job.device, result)
        if sent:
            await self.store.sent(sent, self._clock.unix(), key)
        return len(sent)

    async def _send(self, job: DeviceJob) -> None:
        data = self._signer.sign(job.document, JOB_TYPE)
        await self._link.publish(Message(down(job.device, "job"), data, retain=True))


_REPORTS = msgspec.json.Decoder(JobReport)


def job_maker(devices: DeviceStore, clock: Clock, *, files: str = "") -> JobOf:
    """Return what makes the documents of jobs; a window is by the device's local time, as it reported it.

    Args:
        devices: Of the fleet.
        clock: For windows and expiry.
        files: Base URL of the files of releases, or "".
    """

    def job_of(rollout: Rollout, device: str, version: int, job: str, action: str) -> bytes:
        options, now = rollout.options, clock.unix()
        window = parse_window(options.window)
        opens = 0.0
        if window is not None and action == "install":
            opens = window.not_before(now, _utc_offset_s(devices, device))
        document = Job(
            device=device,
            id=job,
            version=version,
            action=action,  # type: ignore[arg-type]
            target=rollout.target,
            length=rollout.length,
            digest=rollout.digest,
            counter=rollout.counter,
            expires=max(now, opens) + options.expires_s,
            not_before=opens,
            force=rollout.attempt > 1,
            mirrors=options.mirrors,
            trial_s=options.trial_s,
            trial_requests=options.trial_requests,
            files=files,
        )
        return msgspec.json.encode(document)

    return job_of


def _utc_offset_s(devices: DeviceStore, device: str) -> float:
    try:
        reported = devices.reported(device)
    except (NotFoundError, StorageError):
        return 0.0
    offset = {} if reported is None else reported.facts
    value = offset.get("utc_offset_s", 0)
    return float(value) if isinstance(value, int | float) else 0.0


def plug_rollouts(means: Means) -> Rollouts:
    """Make the part, hear of devices that are there, and answer those that ask for their job."""
    job_of = job_maker(means.devices, means.clock, files=files_url(means.settings))
    store = SqliteRollouts(means.database, means.writes, job_of)
    part = Rollouts(store, means.devices, means.link, means.director, means.clock, complaints=means.complaints)
    means.presence.on_report(part.note_report)
    means.questions.answer_with("job", part.answer)
    return part
