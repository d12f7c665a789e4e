"""A version is tried in a process of its own, while everybody else is served: the parent's end of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import msgspec

from appliance.core.errors import UnavailableError
from appliance.core.releases import Criteria
from appliance.core.settings import Settings
from appliance.core.wishes import SelfTestReport
from appliance.observe.resources import memory, resident_memory
from appliance.registry.known import RegisteredModel
from appliance.serving.self_test_protocol import Order, decode_report, encode, failed_test

NO_ROOM = "no_room"
WATCH_S = 0.05
"""How often its memory is looked at."""
SPARED_SHARE = 0.1
"""Share of the free memory that is left to the others."""
LAST_WORDS_BYTES = 4000
LONGEST_REPORT_BYTES = 64 * 1024
_MEMORY_WORDS = ("bad_alloc", "failed to allocate", "unable to allocate", "cannot allocate", "out of memory")
_PASSED_ON = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ", "CUDA_VISIBLE_DEVICES", "LLAMA_CPP_LIB_PATH")
"""All that it may see of the environment."""
_SET = {"GGML_NO_BACKTRACE": "1"}
"""Or else llama.cpp would start a debugger on its own crash."""


async def run_self_test(settings: Settings, registered: RegisteredModel, criteria: Criteria) -> SelfTestReport:
    """Load a version in a child process, and hold it against the criteria.

    Where the memory would hold it alone but not beside what runs, nothing can be tried: the report says so, with the
    code `no_room`, and leaves the verdict to the trial.

    Raises:
        UnavailableError: The process cannot be started.
    """
    free = memory()
    needs = f"It needs {registered.minimum_memory / 2**20:.0f} MiB of memory;"
    if registered.minimum_memory > free.total:
        detail = f"{needs} the box has {free.total / 2**20:.0f}."
        return failed_test("out_of_memory", detail)
    if registered.minimum_memory > free.available:
        detail = f"{needs} {free.available / 2**20:.0f} MiB are free beside what runs, so it was not tried."
        return SelfTestReport(passed=True, code=NO_ROOM, detail=detail)
    limit = criteria.most_memory or int((1 - SPARED_SHARE) * free.available)
    order = encode(Order(settings, registered.full_name, criteria, limit))
    child = _Child(await _start(), limit)
    try:
        async with asyncio.timeout(criteria.test_timeout_s):
            return await child.exchange(order)
    except TimeoutError:
        detail = f"It was not done after {criteria.test_timeout_s:g} s."
        return failed_test("timeout", detail, memory=child.peak)
    finally:
        await child.stop()


async def _start() -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            "appliance.serving.self_test_child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ} | _SET,
        )
    except OSError as error:
        raise UnavailableError(
            f"The process that tries a version cannot be started: {error.strerror}.",
            advice="The machine may be out of memory or processes; `appliance doctor` looks.",
        ) from error


class _Child:
    """A running `self_test_child`.

    Attributes:
        peak: Bytes of it at its largest, as far as was seen.
    """

    def __init__(self, process: asyncio.subprocess.Process, limit: int) -> None:
        self._process = process
        self._limit = limit
        self._over = False
        self.peak = 0

    async def exchange(self, order: bytes) -> SelfTestReport:
        """Send the order, and return what came of it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell(order), name="self-test: order")
            said = tasks.create_task(self._report(), name="self-test: report")
            words = tasks.create_task(self._last_words(), name="self-test: last words")
            watch = tasks.create_task(self._watch(), name="self-test: memory")
            code = await self._process.wait()
            watch.cancel()
        return self._judge(code, said.result(), words.result())

    async def stop(self) -> None:
        """Kill it, and wait for its end."""
        if self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                return  # it ended just now
        await self._process.wait()

    async def _tell(self, order: bytes) -> None:
        assert self._process.stdin is not None
        if self._process.stdin.is_closing():
            return  # it has ended before it was told; how says more
        try:
            self._process.stdin.write(order)
            await self._process.stdin.drain()
        except ConnectionError:
            return  # how it ended says more
        self._process.stdin.close()

    async def _report(self) -> bytes:
        assert self._process.stdout is not None
        return await self._process.stdout.read(LONGEST_REPORT_BYTES)

    async def _last_words(self) -> str:
        assert self._process.stderr is not None
        kept = b""
        while piece := await self._process.stderr.read(LAST_WORDS_BYTES):
            kept = (kept + piece)[-LAST_WORDS_BYTES:]
        return kept.decode(errors="replace")

    async def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, resident_memory(self._process.pid))
            if self.peak > self._limit:
                self._over = True
                self._process.kill()
                return
            await asyncio.sleep(WATCH_S)

    def _judge(self, code: int, said: bytes, words: str) -> SelfTestReport:
        if code == 0:
            try:
                return decode_report(said)
            except msgspec.DecodeError:
                return failed_test("crashed", "It ended without a word.", memory=self.peak)
        last = next((line.strip() for line in reversed(words.splitlines()) if line.strip()), "")
        if self._over or code == -signal.SIGKILL or any(each in words.lower() for each in _MEMORY_WORDS):
            detail = f"It took {self.peak / 2**20:.0f} MiB of memory, and might take {self._limit / 2**20:.0f}."
            return failed_test("out_of_memory", detail, memory=self.peak)
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        detail = f"Its process ended with {ended}: {last:.300}"
        return failed_test("crashed", detail, memory=self.peak)
