"""Blocks of a model file from the hub, over the connection that stands: pulled, so that the hub never floods a box.

Requests and blocks are of QoS 0: whatever is lost is simply asked for again, and a broker that keeps nothing for us
loses nothing of ours. A break of the connection costs what was on its way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

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
        self._arrived: asyncio.Queue[Block] = asyncio.Queue(_MOST_QUEUED)
        self._session = 0
        self._connected = asyncio.Event()
        self._digest = ""

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
        if self._arrived.full():
            LOGGER.warning("a block was dropped: more came than were asked for")
            return
        self._arrived.put_nowait(block)

    def source(self, *, patient: bool) -> HubSource:
        """Return the hub as a source of files; a patient one waits for a connection, the other gives up."""
        return HubSource(self, patient=patient)

    async def deliver(self, download: Download, *, patient: bool) -> None:
        """Ask for blocks until nothing is missing. Raises as `Source.deliver`."""
        self._digest = download.pieces.digest
        try:
            await self._deliver(download, patient=patient)
        finally:
            self._digest = ""
            while not self._arrived.empty():
                self._arrived.get_nowait()

    async def _deliver(self, download: Download, *, patient: bool) -> None:
        window = Window(download.missing_blocks())
        pace = Pace(self._bytes_per_s(), self._clock.monotonic())
        session, gone = self._session, 0
        while not download.complete:
            await self._until_connected(patient=patient)
            if session != self._session:
                session = self._session
                window.disconnected()
            if window.done:  # nothing is asked for, and yet pieces are missing
                window.put_back(download.missing_blocks())
            await self._ask(window, pace, download.pieces.digest)
            block = await self._next(min(_TICK_S, pace.wait_s() or _TICK_S))
            if block is None:
                continue
            if block.code:
                gone += 1
                self._check_gone(block, gone)
            elif window.arrived(block.index, self._clock.monotonic()):
                gone = 0
                await self._take(download, window, block)

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

    async def _ask(self, window: Window, pace: Pace, digest: str) -> None:
        now = self._clock.monotonic()
        for ask in window.ask(now, pace.blocks(now)):
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

    async def _next(self, timeout_s: float) -> Block | None:
        if not self._arrived.empty():
            return self._arrived.get_nowait()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._arrived.get()
        return None

    def _check_gone(self, block: Block, count: int) -> None:
        if count >= GONE_ANSWERS or block.code != "gone":
            raise SourceError(f"The hub has no file sha256-{block.digest} ({block.code:.50}).", code=block.code[:50])

    async def _take(self, download: Download, window: Window, block: Block) -> None:
        verdict = await download.put_block(block.index, block.data, HubSource.name)
        if verdict is Verdict.WRONG:
            window.put_back(download.pieces.blocks(block.index // BLOCKS_A_PIECE))
        elif verdict is Verdict.MALFORMED:
            window.put_back([block.index])


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
