"""The part of the agent that installs signed releases: one job at a time, exactly as `update_machine` has it.

    a job       envelope opened ─▶ for this device, and newer than any before ─▶ the journal; what runs is interrupted
    the work    due? ─▶ side effect ─▶ its result into the journal, unless the job stands elsewhere by then ─▶ again
    reports     the oldest of the journal is sent until the hub has it, then the next

Whatever happens here, the models that run go on running.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, StorageError, UnavailableError
from appliance.core.fleet import DownKind, Job, JobReport, Question, up
from appliance.core.messaging import Link, Message
from appliance.fleet.hub_source import HubBlocks
from appliance.fleet.journal import Entry, Journal
from appliance.fleet.part import Asking
from appliance.fleet.update_machine import Event, due, expire
from appliance.fleet.update_steps import Releases, Steps

LOGGER = logging.getLogger("appliance.fleet")

LONGEST_WAIT_S = 60.0
"""The wall clock may jump, so nothing that it decides is waited for longer at a time."""

MOST_OFFERED = 8
LOOK_AGAIN_S = 15.0
REPORT_AGAIN_S = 30.0
REPORT_EXPIRY_S = 86_400


class Updates:
    """Reads `job` and `blk`."""

    def __init__(
        self,
        device: str,
        link: Link,
        journal: Journal,
        steps: Steps,
        *,
        hub: HubBlocks,
        releases: Releases,
        asking: Asking,
        clock: Clock,
    ) -> None:
        """Take what the work needs.

        Args:
            device: Ours.
            link: To the hub.
            journal: Where jobs and reports are.
            steps: The side effects.
            hub: Where blocks are handed on to.
            releases: Tells which job is to be believed.
            asking: Asks for the current job, in case the broker has forgotten it.
            clock: For windows, pauses and expiry.
        """
        self._device = device
        self._link = link
        self._journal = journal
        self._steps = steps
        self._hub = hub
        self._releases = releases
        self._asking = asking
        self._clock = clock
        self._news = asyncio.Event()
        self._report_news = asyncio.Event()
        self._greeted = asyncio.Event()
        self._offered: asyncio.Queue[bytes] = asyncio.Queue(MOST_OFFERED)
        self._sent = 0
        self._sent_at = 0.0
        self._acknowledged = 0

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return the topics it reads."""
        return frozenset({"job", "blk"})

    async def handle(self, kind: DownKind, message: Message) -> None:
        """Take a job or a block."""
        if kind == "blk":
            self._hub.handle(message)
        else:
            self._offer(message.payload)

    async def connected(self) -> None:
        """Begin a session: blocks are asked for anew, and reports sent again."""
        self._hub.connected()
        self._greeted.set()
        self._sent = 0
        self._report_news.set()

    def acknowledged(self, up_to: int) -> None:
        """Take note that the hub has committed the reports up to a sequence."""
        self._acknowledged = max(self._acknowledged, up_to)
        self._report_news.set()

    async def take(self, envelope: bytes) -> bool:
        """Take a job on, if it is a signed one, for us, and newer than any before.

        Returns:
            Whether it was; what was refused changed nothing.

        Raises:
            UnavailableError: The hub cannot be asked for the director's keys now.
        """
        try:
            job = await self._releases.open_job(envelope)
        except UnavailableError:
            raise
        except ApplianceError as error:
            LOGGER.warning("a job was refused: %s", error)
            return False
        if not await self._journal.take(job):
            LOGGER.info("the job %s, version %d, is none that we have not seen", job.id, job.version)
            return False
        LOGGER.info("the job %s, version %d: %s %s", job.id, job.version, job.action, job.target)
        self._news.set()
        self._report_news.set()
        return True

    async def install(self, job: Job) -> None:
        """Take on what a person at the box wants installed; who signed the release is checked like the hub's.

        Raises:
            ConflictError: Another job is on trial.
        """
        await self._journal.take_local(job)
        LOGGER.info("%s: %s is to be installed from a folder", job.id, job.target)
        self._news.set()
        self._report_news.set()

    async def run(self) -> None:
        """Work until cancelled, connected or not."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._work(), name="updates")
            tasks.create_task(self._report(), name="update reports")
            tasks.create_task(self._ask_for_job(), name="update questions")
            tasks.create_task(self._look_at_jobs(), name="update jobs")

    # The work

    async def _work(self) -> None:
        while True:
            self._news.clear()
            entry = self._journal.current()
            if entry is not None:
                await self._step(entry)
            elif (left := self._journal.leftover()) is None:
                await self._news.wait()
            elif not await self._tidied(left):
                await self._sleep(LOOK_AGAIN_S)

    async def _tidied(self, left: Entry) -> bool:
        try:
            return await self._steps.tidy(left)
        except StorageError as error:
            LOGGER.warning("what the job %s left behind cannot be removed now: %s", left.job.id, error)
            return False

    async def _step(self, entry: Entry) -> None:
        now = self._clock.unix()
        if expire(entry.update, now) != entry.update:
            await self._journal.expire(entry.update)
            self._report_news.set()
            return
        effect, until = due(entry.update, now)
        if effect == "wait":
            await self._sleep(min(LONGEST_WAIT_S, until - now))
            return
        event = await self._interruptible(entry)
        if event is not None:
            update = await self._journal.advance(entry.update, event)
            self._report_news.set()
            if update is not None and update.state != entry.update.state:
                LOGGER.info("the job %s is %s %s", update.job, update.state, update.code)

    async def _interruptible(self, entry: Entry) -> Event | None:
        """Carry out what is due; None if a newer job or the job's end came first."""
        effect, _ = due(entry.update, self._clock.unix())
        ends = effect in ("roll_back", "discard")  # what undoes is not interrupted
        async with asyncio.TaskGroup() as group:
            work = group.create_task(self._steps.perform(effect, entry), name=f"update {effect}")
            news = group.create_task(self._until_changed(entry), name="update interrupted")
            await asyncio.wait({work} if ends else {work, news}, return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            work.cancel()
        return None if work.cancelled() else work.result()

    async def _until_changed(self, entry: Entry) -> None:
        """Return once the job stands elsewhere than where the side effect began, or its time is over."""
        while self._journal.current() == entry:
            self._news.clear()
            now = self._clock.unix()
            if expire(entry.update, now) != entry.update:
                return
            left = entry.update.expires - now
            await self._sleep(min(LONGEST_WAIT_S, left) if left > 0 else LONGEST_WAIT_S)

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    # Reports and jobs

    async def _report(self) -> None:
        """Send the oldest report until it is acknowledged: one at a time, so that no gap is ever acknowledged."""
        while True:
            self._report_news.clear()
            if self._sent and self._acknowledged >= self._sent:
                await self._journal.acknowledge(self._sent)
            report = self._journal.oldest_report()
            is_late = self._clock.monotonic() - self._sent_at >= REPORT_AGAIN_S
            if report is not None and self._link.connected and (report.sequence != self._sent or is_late):
                await self._send(report)
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_AGAIN_S):  # wait_for may swallow a cancellation
                    await self._report_news.wait()

    async def _send(self, report: JobReport) -> None:
        payload = msgspec.json.encode(report)
        try:
            await self._link.publish(Message(up(self._device, "job", report.job), payload, expiry_s=REPORT_EXPIRY_S))
        except ApplianceError as error:
            LOGGER.info("a report was not sent: %s", error)
        else:
            self._sent, self._sent_at = report.sequence, self._clock.monotonic()

    async def _ask_for_job(self) -> None:
        """Ask in each session for the current job: a broker that lost its memory does not have it any more."""
        while True:
            await self._greeted.wait()
            self._greeted.clear()
            try:
                answer = await self._asking.ask(Question("job"))
            except UnavailableError as error:
                LOGGER.info("the hub was not asked for the current job: %s", error)
                continue
            if answer.ok and answer.data:
                self._offer(answer.data)

    def _offer(self, envelope: bytes) -> None:
        """Let a job be looked at; if many come at once, the oldest ones have been replaced by their hub since."""
        if self._offered.full():
            self._offered.get_nowait()
        self._offered.put_nowait(envelope)

    async def _look_at_jobs(self) -> None:
        """Take on what is offered. Who signs may have to be asked, so this is not done while a message is handled."""
        while True:
            envelope = await self._offered.get()
            try:
                await self.take(envelope)
            except UnavailableError as error:
                LOGGER.info("a job waits, since it cannot be checked now: %s", error)
                await asyncio.sleep(LOOK_AGAIN_S)
                self._offer(envelope)
