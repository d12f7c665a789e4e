"""Works batches off, a bounded number of lines at once, and takes up after a restart what was not through.

A line is noted before it is begun and kept when it is answered, so after a kill at most the lines that were being
answered are answered anew, and none is in the output twice or not at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing

from appliance.batches.ledger import Ledger
from appliance.batches.lines import (
    MOST_INTERRUPTIONS,
    Check,
    Line,
    RequestLine,
    answered_line,
    failed_line,
    pause_before_retry,
    read_line,
)
from appliance.batches.output import Output, new_request_id
from appliance.batches.reading import lines_of
from appliance.batches.states import UNFINISHED, Event
from appliance.core.batches import (
    BATCH_PURPOSE,
    Batch,
    BatchError,
    Caller,
    Callers,
    LineAnswer,
    NewBatch,
    OfflineDoor,
)
from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, ConflictError, InvalidRequestError, NotFoundError, TooLargeError
from appliance.core.retrieval import Files
from appliance.core.settings import Settings
from appliance.observe.metrics import BatchMetrics

logger = logging.getLogger("appliance.batches")

MOST_OPEN = 8
"""Batches whose input is open at once; the others wait for their turn."""

BACK_OFF_S = (1.0, 60.0)
"""First and longest wait after a disk that failed."""

_INPUT_GONE = BatchError("input_file_deleted", "The input file was deleted while the batch ran.")
_KEY_GONE = BatchError("api_key_revoked", "The API key of the batch was revoked while it ran.")


class BatchRunner:
    """Answers `core.batches.Batches`. `run` it for as long as it serves."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        clock: Clock,
        *,
        files: Files,
        door: OfflineDoor,
        callers: Callers,
        metrics: BatchMetrics,
    ) -> None:
        """Connect it; nothing runs yet.

        Args:
            settings: `max_batches`, `max_batch_lines`, `max_body_bytes` and `batch_concurrency`.
            ledger: Where batches are kept.
            clock: For times.
            files: Where inputs and outputs are.
            door: What answers the lines.
            callers: Who may have work done.
            metrics: Where to count.
        """
        self._settings = settings
        self._ledger = ledger
        self._clock = clock
        self._files = files
        self._door = door
        self._callers = callers
        self._metrics = metrics
        self._slots = asyncio.Semaphore(settings.batch_concurrency)
        self._open = asyncio.Semaphore(MOST_OPEN)
        self._limits: dict[str, asyncio.Timeout] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._draining = False

    async def run(self) -> None:
        """Take up what was left, and work off what comes, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for name in self._ledger.unfinished():
                    self._start(name)
                await asyncio.Event().wait()
        finally:
            self._tasks = None

    def drain(self) -> None:
        """Begin no further line: the process is about to stop, and the next one goes on."""
        self._draining = True

    async def create(self, new: NewBatch, *, tenant: str) -> Batch:
        """Keep a batch and begin with it; see `core.batches.Batches.create`."""
        try:
            purpose = self._files.get(new.input_file, tenant=tenant).purpose
        except NotFoundError as error:
            error.param = "input_file_id"
            raise
        if purpose != BATCH_PURPOSE:
            raise InvalidRequestError(
                f"The file {new.input_file} was uploaded for {purpose!r}.",
                advice=f"Upload it with the purpose {BATCH_PURPOSE!r}.",
                param="input_file_id",
                code="invalid_purpose",
            )
        batch = await self._ledger.create(new, tenant=tenant, most_unfinished=self._settings.max_batches)
        self._start(batch.id)
        return batch

    def get(self, batch: str, *, tenant: str) -> Batch:
        """Return one batch. Raises NotFoundError."""
        return self._ledger.get(batch, tenant=tenant)

    def list(self, *, tenant: str, limit: int, after: str) -> tuple[Sequence[Batch], bool]:
        """Return batches, newest first, and whether there are more."""
        return self._ledger.list(tenant=tenant, limit=limit, after=after)

    async def cancel(self, batch: str, *, tenant: str) -> Batch:
        """Stop a batch; see `core.batches.Batches.cancel`."""
        self._ledger.get(batch, tenant=tenant)
        found = await self._ledger.apply(batch, Event.CANCEL)
        if found.status not in ("cancelling", "cancelled"):
            raise ConflictError(
                f"{batch} cannot be cancelled: its status is {found.status}.",
                advice="All its lines have their answers, or it has ended.",
                code="batch_ended",
            )
        if (limit := self._limits.get(batch)) is not None:
            limit.reschedule(asyncio.get_running_loop().time())
        return found

    def _start(self, name: str) -> None:
        if self._tasks is not None:  # else `run` takes it up
            self._tasks.create_task(self._carry_out(name), name=f"batch {name}")

    async def _carry_out(self, name: str) -> None:
        """Bring a batch to its end; while a disk fails, wait ever longer and go on from what was kept."""
        wait_s, longest = BACK_OFF_S
        while True:
            try:
                await self._go_on(name)
            except* ApplianceError as errors:
                logger.warning("The batch %s waits %g s: %s", name, wait_s, errors.exceptions[0])
            if (batch := self._ledger.get(name)).status not in UNFINISHED:
                break
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, longest)
        self._metrics.batch_ended(batch.status)
        logger.info(
            "The batch %s is %s: %d of %d lines completed.",
            name,
            batch.status,
            batch.counts.completed,
            batch.counts.total,
        )

    async def _go_on(self, name: str) -> None:
        """Go on with a batch from where it is, to its end."""
        batch = self._ledger.get(name)
        if batch.status in ("validating", "in_progress"):
            await self._within_its_time(batch)
        await self._finish(name)

    async def _within_its_time(self, batch: Batch) -> None:
        """Answer all lines until the batch expires or is cancelled; either cuts off what is being answered."""
        left_s = batch.expires - self._clock.unix()
        try:
            async with asyncio.timeout(left_s) as limit:
                self._limits[batch.id] = limit
                async with self._open:
                    await self._answer_all(await self._validated(batch))
        except TimeoutError:
            if not limit.expired():
                raise
            await self._ledger.apply(batch.id, Event.EXPIRE)  # too late, and so without effect, if it was cancelled
        finally:
            self._limits.pop(batch.id, None)

    async def _validated(self, batch: Batch) -> Batch:
        """Look through all lines, unless that was done, and return the batch as it then is."""
        if batch.status != "validating":
            return batch
        check = Check(
            batch.endpoint, most_lines=self._settings.max_batch_lines, most_bytes=self._settings.max_body_bytes
        )
        try:
            async for piece in self._files.content(batch.input_file, tenant=batch.tenant):
                await asyncio.to_thread(check.feed, piece)
                if check.hopeless:
                    break
        except NotFoundError:
            return await self._ledger.apply(batch.id, Event.BREAK, errors=[_INPUT_GONE])
        await asyncio.to_thread(check.close)
        if check.errors:
            return await self._ledger.apply(batch.id, Event.REFUSED, total=check.total, errors=check.errors)
        return await self._ledger.apply(batch.id, Event.VALIDATED, total=check.total)

    async def _answer_all(self, batch: Batch) -> None:
        """Answer every line that has no answer yet."""
        if batch.status != "in_progress":
            return
        answered = self._ledger.answered(batch.id)
        gone: BatchError | None = None
        async with asyncio.TaskGroup() as tasks:
            try:
                async with aclosing(lines_of(self._files, batch, self._settings.max_body_bytes)) as lines:
                    async for line in lines:
                        if line.number in answered:
                            continue
                        if (caller := await self._turn(batch)) is None:
                            gone = _KEY_GONE
                            break
                        task = tasks.create_task(self._answer(batch, line, caller), name=f"batch line {line.number}")
                        task.add_done_callback(lambda _: self._slots.release())
            except NotFoundError:
                gone = _INPUT_GONE
        if gone is None:
            await self._ledger.apply(batch.id, Event.WORKED_OFF)
        else:
            await self._ledger.apply(batch.id, Event.BREAK, errors=[gone])

    async def _turn(self, batch: Batch) -> Caller | None:
        """Wait until a line may be begun, and return in whose name; None if its key is gone, and then no slot is taken.

        Slots are given in the order of asking, and each batch asks for one at a time: batches take turns.
        """
        await self._slots.acquire()
        try:
            if self._draining:
                await asyncio.Event().wait()
            caller = self._callers.find(batch.tenant)
        except BaseException:
            self._slots.release()
            raise
        if caller is None:
            self._slots.release()
        return caller

    async def _answer(self, batch: Batch, line: Line, caller: Caller) -> None:
        """Answer one line, and keep the answer."""
        request = read_line(line, batch.endpoint, self._settings.max_body_bytes)
        assert isinstance(request, RequestLine), "all lines were looked through"
        identity = new_request_id()
        if await self._ledger.begin_line(batch.id, line.number) > MOST_INTERRUPTIONS:
            message = f"The appliance stopped {MOST_INTERRUPTIONS} times while it answered the line."
            written, completed = failed_line(identity, request.custom_id, "line_interrupted", message), False
        else:
            answer = await self._ask(batch, bytes(request.body), caller, identity)
            written = answered_line(identity, request.custom_id, answer.status, identity, answer.body)
            completed = answer.status == 200
        if await self._ledger.end_line(batch.id, line.number, written, completed=completed):
            self._metrics.line_answered(completed=completed)

    async def _ask(self, batch: Batch, body: bytes, caller: Caller, request_id: str) -> LineAnswer:
        """Have a line answered; an overload is waited out."""
        tries = 0
        while True:
            answer = await self._door.answer(batch.endpoint, body, caller=caller, request_id=request_id)
            tries += 1
            pause_s = pause_before_retry(answer.status, tries, answer.retry_after_s)
            if pause_s is None:
                return answer
            await asyncio.sleep(pause_s)

    async def _finish(self, name: str) -> None:
        """Write the output of a batch whose lines are through, and end it."""
        batch, state = self._ledger.get(name), self._ledger.outcome(name)
        if state.outcome is None:
            return
        output = Output(self._ledger, self._files, batch, state.outcome, self._settings.max_body_bytes)
        try:
            names = await output.write()
        except TooLargeError as error:
            await self._ledger.apply(name, Event.BREAK, errors=[BatchError("output_too_large", str(error))])
            return
        await self._ledger.finish(name, *names)
        await self._forget()

    async def _forget(self) -> None:
        try:
            await self._ledger.erase()
        except ApplianceError as error:
            logger.warning("%s", error)  # the next batch that ends tries again
