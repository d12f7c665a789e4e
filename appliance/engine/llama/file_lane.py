"""The files of parked states, read and written off the event loop, one after another.

The worker's thread says what is to be done and never waits for it; the outcome goes back as a command.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path

from appliance.core.errors import ApplianceError, StorageError
from appliance.engine.llama.keeper import (
    EraseForGood,
    EraseState,
    Fetched,
    FileJob,
    Found,
    Outcome,
    ReadState,
    WriteState,
    Written,
)
from appliance.engine.llama.parked_state import ParkedState
from appliance.engine.llama.state_files import StateFiles
from appliance.engine.llama.state_format import Origin

LOGGER = logging.getLogger("appliance.engine")
CLOSE_TIMEOUT_S = 20.0
"""What is not on disk by then, when a model is unloaded, is computed again another day."""


class FileLane:
    """Owns one engine's folder of states. Everything is called on the loop."""

    def __init__(self, files: StateFiles, answer: Callable[[Outcome], None]) -> None:
        """Carry out jobs on the files; `answer` is called with each outcome that the worker waits for."""
        self._files = files
        self._answer = answer
        self._loop = asyncio.get_running_loop()
        self._jobs: deque[FileJob] = deque()
        self._busy = False
        self._done = asyncio.Event()
        self._done.set()

    @classmethod
    async def open(cls, root: Path, origin: Origin, answer: Callable[[Outcome], None]) -> FileLane | None:
        """Open the folder and tell of the states in it; None, and a line in the log, if there can be none."""
        try:
            files, found = await asyncio.to_thread(_open, root, origin)
        except ApplianceError as error:
            LOGGER.warning("conversations are parked in RAM only: %s", error)
            return None
        answer(Found(found))
        return cls(files, answer)

    def put(self, job: FileJob) -> None:
        """Carry out a job after those before it."""
        self._jobs.append(job)
        self._done.clear()
        self._next()

    async def close(self) -> None:
        """Wait for the jobs, within limits, and release the folder."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._done.wait()
        except TimeoutError:
            LOGGER.warning("%d parked conversations could not be written in time", len(self._jobs))
            self._jobs.clear()
            await self._done.wait()  # the one that is being written
        await asyncio.to_thread(self._files.close)

    def _next(self) -> None:
        if self._busy:
            return
        if not self._jobs:
            self._done.set()
            return
        self._busy = True
        work = self._loop.run_in_executor(None, _carry_out, self._files, self._jobs.popleft())
        work.add_done_callback(self._finished)

    def _finished(self, work: asyncio.Future[Outcome | None]) -> None:
        self._busy = False
        outcome = work.result()
        if outcome is not None:
            self._answer(outcome)
        self._next()


def _open(root: Path, origin: Origin) -> tuple[StateFiles, tuple[ParkedState, ...]]:
    files = StateFiles(root, origin.fingerprint)
    try:
        return files, tuple(
            ParkedState(each.id, each.tokens, each.space, each.size, each.session) for each in files.scan()
        )
    except BaseException:
        files.close()
        raise


def _carry_out(files: StateFiles, job: FileJob) -> Outcome | None:
    try:
        match job:
            case WriteState(head, payload):
                files.write(head, payload)
                return Written(head.id, succeeded=True)
            case ReadState(head):
                fetched = Fetched(head.id, files.read(head))
                files.touch(head.id)
                return fetched
            case EraseState(state_id):
                files.erase(state_id)
            case EraseForGood():
                _erase_for_good(files, job)
    except StorageError as error:
        LOGGER.warning("%s", error)
    except MemoryError:
        LOGGER.warning("there is no memory to read a parked conversation")
    match job:
        case WriteState(head, _):
            return Written(head.id, succeeded=False)
        case ReadState(head):
            return Fetched(head.id, None)
    return None


def _erase_for_good(files: StateFiles, job: EraseForGood) -> None:
    try:
        for state_id in job.ids:
            files.erase(state_id)
        files.sync()
    except StorageError as error:
        job.done(error)
    else:
        job.done(None)
