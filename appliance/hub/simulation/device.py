"""One simulated device: what it says when it is connected, when time passes, and when it is told something.

Pure: messages and seconds in, messages out. It believes every envelope, for it is there to try the hub, not itself.
What the hub has to acknowledge is kept and said again until it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Generic, Literal, TypeVar

import msgspec

from appliance.core.fleet import (
    HUB_TOPIC,
    Command,
    CommandResult,
    Desired,
    DeviceState,
    HubState,
    Job,
    JobReport,
    Reported,
    ReportedModel,
    TelemetryAck,
    TelemetryBatch,
    TelemetryRow,
    down,
    up,
)
from appliance.core.messaging import Message
from appliance.hub.simulation.jobs import seconds_of, steps_of
from appliance.hub.simulation.traits import Scenario, traits_of

AGENT = "simulated"
MOST_KEPT = 240
"""Batches and reports that wait for the hub; the oldest goes first, as in a box whose outbox is full."""

_BATCH_EXPIRY_S = 600
_REPORT_EXPIRY_S = 86_400
_REPLIES = 16

T = TypeVar("T")

Said = Message | TelemetryBatch
"""What a device says; a batch still has to be packed."""


class _Envelope(msgspec.Struct, frozen=True):
    payload: bytes


@dataclass(slots=True)
class _Kept(Generic[T]):
    """What was said at a time, and whether that was a repetition."""

    said: T
    at: float
    repeated: bool = False

    def again(self, now: float, after_s: float) -> bool:
        """Tell whether it is to be said again, and note that it is."""
        if now - self.at < after_s:
            return False
        self.at, self.repeated = now, True
        return True


class SimulatedDevice:
    """A device's memory and its manners.

    Attributes:
        id: Its id.
        epoch: Of its newest session.
        gone: It was lost on purpose, and stays away.
        hold_off_s: What the hub asked for last; whoever connects it takes it from here.
        finished: How its jobs ended, by state.
        told: Batches that it was first sent.
        kept: Of these, those that the hub has acknowledged.
        overflowed: Batches and reports that went unacknowledged because others came.
        repeated: Batches and reports that were said again.
    """

    def __init__(self, device: str, scenario: Scenario, now: float, *, epoch: int = 0, boot: int = 1) -> None:
        """Make a device that was just switched on; `epoch` and `boot` are above those of its earlier lives."""
        self.id = device
        self.traits = traits_of(scenario, device)
        self.epoch = epoch
        self.gone = False
        self.hold_off_s = 0.0
        self.finished: dict[str, int] = {}
        self.told = self.kept = self.overflowed = self.repeated = 0
        self._scenario = scenario
        self._boot = boot
        self._began = now
        self._sequence = 0
        self._next_batch = now + self.traits.phase * scenario.batch_every_s if scenario.batch_every_s else float("inf")
        self._batches: dict[int, _Kept[TelemetryBatch]] = {}
        self._reports: dict[int, _Kept[JobReport]] = {}
        self._round_trips: list[float] = []
        self._report_sequence = 0
        self._steps: list[tuple[float, int, JobReport | None]] = []
        self._job = 0
        self._replies: dict[str, Message] = {}
        self._reported_version = epoch  # above that of its earlier lives
        self._desired: Desired | None = None
        self._models: dict[str, ReportedModel] = {}
        self._readers: dict[str, Callable[[Message, float], Iterable[Said]]] = {
            HUB_TOPIC: self._note_hub,
            down(device, "cmd"): self._answer,
            down(device, "job"): self._take_job,
            down(device, "des"): self._apply,
            down(device, "ack"): self._forget,
        }

    def begin(self, now: float) -> Message:
        """Begin a session; returns its Will."""
        self.epoch += 1
        self._began = now
        return self._state("lost")

    def greet(self, now: float) -> Iterator[Said]:
        """Say what has to be said after connecting, and what the hub has not acknowledged."""
        yield self._state("online")
        yield self._report()
        yield from self._repeated(now, after_s=0.0)

    def stop_telling(self) -> None:
        """Make no further batch; those that wait are still sent again."""
        self._next_batch = float("inf")

    @property
    def asked(self) -> bool:
        """Tell whether it was ever given a job."""
        return self._job > 0

    @property
    def said(self) -> tuple[int, int]:
        """Return the epoch of its newest birth and the version of its newest reported twin."""
        return self.epoch, self._reported_version

    @property
    def due_at(self) -> float:
        """Return when it has something to say next."""
        waiting = [*(each.at for each in self._batches.values()), *(each.at for each in self._reports.values())]
        again = min(waiting, default=float("inf")) + self._scenario.retry_s
        return min(self._next_batch, again, self._steps[0][0] if self._steps else float("inf"))

    def due(self, now: float) -> Iterator[Said]:
        """Return what it has to say by now."""
        while self._steps and self._steps[0][0] <= now and not self.gone:
            yield from self._step(heappop(self._steps)[2], now)
        if self.gone:
            return
        if self._next_batch <= now:
            yield from self._batch(now)
        yield from self._repeated(now, after_s=self._scenario.retry_s)

    def receive(self, message: Message, now: float) -> Iterator[Said]:
        """Take a message; what is not understood is left alone, as by a box of another version."""
        reader = self._readers.get(message.topic)
        if reader is None:
            return
        try:
            yield from reader(message, now)
        except msgspec.MsgspecError:
            return

    def take_round_trips(self) -> list[float]:
        """Return the seconds from a batch to its acknowledgement, of those that came since the last call.

        Batches that were sent more than once do not count: which of them was acknowledged is not known.
        """
        taken, self._round_trips = self._round_trips, []
        return taken

    def _state(self, status: Literal["online", "lost"]) -> Message:
        state = DeviceState(
            epoch=self.epoch, status=status, at=self._began, agent=AGENT, instance=f"simulated-{self.id}"
        )
        return Message(up(self.id, "state"), msgspec.json.encode(state), retain=True)

    def _report(self) -> Message:
        self._reported_version += 1
        desired = self._desired
        reported = Reported(
            version=self._reported_version,
            desired_version=desired.version if desired else 0,
            settings=desired.settings if desired else {},
            models=list(self._models.values()),
            facts={"hardware": self.traits.hardware, "memory": 8 << 30, "agent": AGENT},
        )
        return Message(up(self.id, "rep"), msgspec.json.encode(reported), retain=True)

    def _batch(self, now: float) -> Iterator[Said]:
        first = self._sequence + 1
        rows = [
            TelemetryRow(sequence=first + index, at=now, kind="resources", body=_resources(first + index))
            for index in range(self._scenario.rows)
        ]
        self._sequence += len(rows)
        self._next_batch += self._scenario.batch_every_s * max(
            1.0, (now - self._next_batch) // self._scenario.batch_every_s
        )
        batch = TelemetryBatch("health", self._boot, first, self._sequence, rows)
        self._keep(self._batches, first, batch, now)
        self.told += 1
        yield from self._say(batch)

    def _step(self, report: JobReport | None, now: float) -> Iterator[Said]:
        if report is None:
            self.gone = True
            return
        self._report_sequence += 1
        report = msgspec.structs.replace(report, sequence=self._report_sequence, at=now)
        self._keep(self._reports, report.sequence, report, now)
        yield from self._say(self._packed(report))
        if report.state in {"confirmed", "failed", "rolled_back", "canceled"}:
            self.finished[report.state] = self.finished.get(report.state, 0) + 1
            yield self._report()

    def _keep(self, kept: dict[int, _Kept[T]], sequence: int, said: T, now: float) -> None:
        kept[sequence] = _Kept(said, now)
        if len(kept) > MOST_KEPT:
            del kept[next(iter(kept))]
            self.overflowed += 1

    def _repeated(self, now: float, *, after_s: float) -> Iterator[Said]:
        for report in list(self._reports.values()):
            if report.again(now, after_s):
                self.repeated += 1
                yield self._packed(report.said)
        for batch in list(self._batches.values()):
            if batch.again(now, after_s):
                self.repeated += 1
                yield batch.said

    def _say(self, said: Said) -> Iterator[Said]:
        yield said
        if self.traits.duplicating:
            yield said

    def _packed(self, report: JobReport) -> Message:
        return Message(up(self.id, "job", report.job), msgspec.json.encode(report), expiry_s=_REPORT_EXPIRY_S)

    def _note_hub(self, message: Message, now: float) -> Iterable[Said]:  # noqa: ARG002
        self.hold_off_s = max(0.0, msgspec.json.decode(message.payload, type=HubState).hold_off_s)
        return ()

    def _answer(self, message: Message, now: float) -> Iterator[Said]:
        command = msgspec.json.decode(message.payload, type=Command)
        if message.retain:
            return
        reply = self._replies.get(command.id)
        if reply is None:
            late = 0.0 < command.expires < now
            result = CommandResult(command.id, ok=not late, code="expired" if late else "")
            if not late:
                result = msgspec.structs.replace(result, result={"name": command.name, "simulated": True})
            reply = Message(up(self.id, "res"), msgspec.json.encode(result), correlation=message.correlation)
            self._replies[command.id] = reply
            if len(self._replies) > _REPLIES:
                del self._replies[next(iter(self._replies))]
        yield reply

    def _take_job(self, message: Message, now: float) -> Iterator[Said]:
        if not message.payload:
            return
        job = msgspec.json.decode(msgspec.json.decode(message.payload, type=_Envelope).payload, type=Job)
        if job.device != self.id or job.version <= self._job:
            return
        self._job = job.version
        took = seconds_of(self._scenario.job_s, self.traits)
        busy = bool(self._steps)
        self._steps.clear()
        if job.action == "cancel" and not busy:
            return
        for number, step in enumerate(steps_of(job, self.traits)):
            report = None
            if step.state is not None:
                report = JobReport(job.id, job.version, 1, 0, step.state, step.percent, step.code)
            heappush(self._steps, (max(now, job.not_before) + step.after * took, number, report))
        yield from self.due(now)

    def _apply(self, message: Message, now: float) -> Iterator[Said]:  # noqa: ARG002
        if not message.payload:
            return
        envelope = msgspec.json.decode(message.payload, type=_Envelope)
        desired = msgspec.json.decode(envelope.payload, type=Desired)
        if desired.device == self.id and (self._desired is None or desired.version > self._desired.version):
            self._desired = desired
            yield self._report()

    def _forget(self, message: Message, now: float) -> Iterable[Said]:
        ack = msgspec.json.decode(message.payload, type=TelemetryAck)
        if ack.stream == "job" and ack.boot == 0:
            for sequence in [each for each in self._reports if each <= ack.up_to]:
                del self._reports[sequence]
        elif ack.stream == "health" and ack.boot == self._boot:
            batch = self._batches.pop(ack.first, None)
            if batch is not None and not ack.refused:
                self.kept += 1
                self._round_trips += [] if batch.repeated else [now - batch.at]
        return ()


def _resources(sequence: int) -> dict[str, Any]:
    return {"cpu": 0.01 * (sequence % 100), "memory_free": 4_000_000_000 + sequence, "temperature": 41.5, "load": 1.25}


def batch_message(device: str, batch: TelemetryBatch, packed: bytes) -> Message:
    """Return the message of a batch, packed by `messaging.compression`."""
    name = f"{batch.boot}.{batch.first}.{batch.last}".encode()
    return Message(up(device, "tm", batch.stream), packed, expiry_s=_BATCH_EXPIRY_S, correlation=name)
