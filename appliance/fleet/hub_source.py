"""Blocks of a model file from the hub, over the connection that stands: pulled, so that the hub never floods a box.

Requests and blocks are of QoS 0: whatever is lost is simply asked for again, and a broker that keeps nothing for us
loses nothing of ours. A break of the connection costs what was on its way.

    handle ──block, when it came──> asking: the window ──> writing: the disk ──wrong──> asked for again

Asking does not wait for the disk: while a sync takes its time, the link would run empty.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, SourceError, UnavailableError
from appliance.core.fleet import BLOCK_BYTES, Block, BlockRequest, up
from appliance.core.messaging import Link, Message
from appliance.fleet.download import Download, Verdict
from appliance.fleet.pieces import BLOCKS_A_PIECE
from appliance.fleet.window import LARGEST_BYTES, Ask, Pace, Window

LOGGER = logging.getLogger("appliance.fleet")

BLOCK_EXPIRY_S = 30
GONE_ANSWERS = 2
"""Answers without data that are believed: a lone one may be older than the question."""

_MOST_QUEUED = 2 * LARGEST_BYTES // BLOCK_BYTES
_TICK_S = 0.5
_LEAST_WAIT_S = 0.01


class HubBlocks:
    """The blocks that come in, for whoever asked for them."""

    def __init__(self, device: str, link: Link, clock: Clock, bytes_per_s: Callable[[], int]) -> None:
        """Connect to nothing yet.

        Args:
            device: Ours.
            link: To the hub.
            clock: For the window.
            bytes_per_s: The cap of the bandwidth as it is now, 0 for none.
        """
        self._device = device
        self._link = link
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._arrived: deque[tuple[Block, float]] = deque()
        self._news = asyncio.Event()
        self._session = 0
        self._connected = asyncio.Event()
        self._digest = ""
        self._gone = 0

    def connected(self) -> None:
        """Take note of a new connection."""
        self._session += 1
        self._connected.set()

    def handle(self, message: Message) -> None:
        """Take a block in; what nobody waits for, or what is none, is dropped."""
        try:
            block = msgspec.msgpack.decode(message.payload, type=Block)
        except msgspec.DecodeError as error:
            LOGGER.warning("the hub sent what is no block: %s", error)
            return
        if block.digest != self._digest:
            return
        if len(self._arrived) >= _MOST_QUEUED:
            LOGGER.warning("a block was dropped: more came than were asked for")
            return
        self._arrived.append((block, self._clock.monotonic()))
        self._news.set()

    def source(self, *, patient: bool) -> HubSource:
        """Return the hub as a source of files; a patient one waits for a connection, the other gives up."""
        return HubSource(self, patient=patient)

    async def deliver(self, download: Download, *, patient: bool) -> None:
        """Ask for blocks until nothing is missing. Raises as `Source.deliver`."""
        self._digest = download.pieces.digest
        window = Window(download.missing_blocks(), careful=download.was_begun)
        writer = _Writer(download, window, self._news)
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(writer.run(), name="blocks to the disk")
                try:
                    await self._fetch(download, window, writer, patient=patient)
                finally:
                    if not writing.done():
                        await writer.finish()  # what has come is kept
                    writing.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self._digest = ""
            self._arrived.clear()

    async def _fetch(self, download: Download, window: Window, writer: _Writer, *, patient: bool) -> None:
        pace = Pace(self._bytes_per_s(), self._clock.monotonic())
        session: int | None = None
        self._gone = 0
        while not download.complete:
            await self._until_connected(patient=patient)
            if session not in (None, self._session):  # the first one is no interruption
                window.disconnected()
            session = self._session
            if window.done and not writer.unwritten:  # nothing is asked for, and yet pieces are missing
                window.put_back(download.missing_blocks())
            await self._ask(window, pace, download.pieces.digest, _MOST_QUEUED - writer.unwritten)
            wait_s = pace.wait_s() or window.ask_at() - self._clock.monotonic()
            await self._wait(min(_TICK_S, max(_LEAST_WAIT_S, wait_s)))
            self._take_in(window, writer)

    async def _until_connected(self, *, patient: bool) -> None:
        if not self._link.connected:
            self._connected.clear()  # the next session has to be greeted first
        while not (self._link.connected and self._connected.is_set()):
            if not patient:
                raise UnavailableError("There is no connection to the hub.", code="unreachable")
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):  # wait_for may swallow a cancellation
                    await self._connected.wait()
            if not self._link.connected:
                self._connected.clear()

    async def _ask(self, window: Window, pace: Pace, digest: str, room: int) -> None:
        now = self._clock.monotonic()
        for ask in window.ask(now, min(pace.blocks(now), room - window.outstanding)):
            pace.take(len(ask.blocks))
            try:
                await self._link.publish(self._request(ask, digest, now))
            except UnavailableError:
                return  # what was not sent is late after a while, or at the next connection
            except ApplianceError as error:
                raise SourceError(f"The hub cannot be asked for blocks: {error}", code="refused") from error

    def _request(self, ask: Ask, digest: str, now: float) -> Message:
        request = BlockRequest(digest, ask.first, ask.missing, int(now * 1000))
        payload = msgspec.msgpack.encode(request)
        return Message(up(self._device, "blk"), payload, qos=0, expiry_s=BLOCK_EXPIRY_S)

    async def _wait(self, timeout_s: float) -> None:
        """Wait until something has come or was written."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()

    def _take_in(self, window: Window, writer: _Writer) -> None:
        while self._arrived:
            block, came_at = self._arrived.popleft()
            if block.code:
                self._gone += 1
                self._check_gone(block)
            elif window.arrived(block.index, came_at):
                self._gone = 0
                writer.put(block)

    def _check_gone(self, block: Block) -> None:
        if self._gone >= GONE_ANSWERS or block.code != "gone":
            raise SourceError(f"The hub has no file sha256-{block.digest} ({block.code:.50}).", code=block.code[:50])


class _Writer:
    """Puts blocks into a download, one after the other."""

    def __init__(self, download: Download, window: Window, news: asyncio.Event) -> None:
        self._download = download
        self._window = window
        self._news = news
        self._blocks: asyncio.Queue[Block] = asyncio.Queue()
        self.unwritten = 0

    def put(self, block: Block) -> None:
        """Have a block written."""
        self.unwritten += 1
        self._blocks.put_nowait(block)

    async def run(self) -> NoReturn:
        """Write until cancelled. Raises as `Download.put_block`."""
        while True:
            await self._write(await self._blocks.get())

    async def finish(self) -> None:
        """Wait until all blocks are written; they never are once `run` has ended."""
        await self._blocks.join()

    async def _write(self, block: Block) -> None:
        verdict = await self._download.put_block(block.index, block.data, HubSource.name)
        if verdict is Verdict.WRONG:
            self._window.put_back(self._download.pieces.blocks(block.index // BLOCKS_A_PIECE))
        elif verdict is Verdict.MALFORMED:
            self._window.put_back([block.index])
        self.unwritten -= 1
        self._blocks.task_done()
        self._news.set()


class HubSource:
    """The hub as a source of files."""

    name = "the hub"

    def __init__(self, blocks: HubBlocks, *, patient: bool) -> None:
        self._blocks = blocks
        self._patient = patient

    async def deliver(self, download: Download) -> None:
        """Ask for blocks until nothing is missing."""
        download.check_source(self.name)
        await self._blocks.deliver(download, patient=self._patient)
