"""Blocks of released model files for devices (`up/<dev>/blk` → `dn/<dev>/blk`), read from the hub's folder of blobs.

A device pulls: nothing is sent that was not asked for, and no more at once than its window. What is lost on the way is
asked for again, so both directions are of QoS 0 and nothing is kept here but the questions.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError
from appliance.core.fleet import BLOCK_BYTES, Block, BlockRequest, UpKind, down
from appliance.core.messaging import Link, Message
from appliance.hub.block_turns import LONGEST_S, BlockTurns, Wanted, asked_for

if TYPE_CHECKING:
    from appliance.hub.room import Means

logger = logging.getLogger("appliance.hub")

GONE = "gone"
_DECODER = msgspec.msgpack.Decoder(BlockRequest)
_ENCODER = msgspec.msgpack.Encoder()


class Blocks:
    """The part of the hub that serves blocks."""

    kinds: frozenset[UpKind] = frozenset({"blk"})

    def __init__(
        self,
        folder: Path,
        link: Link,
        clock: Clock,
        *,
        bytes_per_s: int = 0,
        refuse: Callable[[str, str, str], None],
    ) -> None:
        """Serve what is in a folder.

        Args:
            folder: Holds released files as `sha256-<hex>`; a file that is removed is gone at once.
            link: To the devices.
            clock: For the cap and for what is too old.
            bytes_per_s: Cap of all devices together, 0 for none.
            refuse: Told device, reason and detail of what will not do.
        """
        self._folder = folder
        self._link = link
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._refuse = refuse
        self._turns = BlockTurns()
        self._news = asyncio.Event()
        self._free_at = 0.0

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:  # noqa: ARG002
        """Queue what a device asks for."""
        try:
            request = _DECODER.decode(message.payload)
        except msgspec.DecodeError as error:
            self._refuse(device, "bad_block_request", str(error))
            return
        blocks = asked_for(request.first, request.missing)
        self._turns.add(device, request.digest, blocks, request.sent, self._clock.monotonic())
        self._news.set()

    async def run(self) -> None:
        """Send blocks in turn until cancelled."""
        while True:
            wanted = self._turns.take(self._clock.monotonic())
            if wanted is None:
                self._news.clear()
                await self._news.wait()
            else:
                await self._serve(wanted)

    async def _serve(self, wanted: Wanted) -> None:
        block = await asyncio.to_thread(self._read, wanted)
        if block.code:
            self._turns.forget(wanted.device, wanted.digest)
        payload = _ENCODER.encode(block)
        try:
            await self._link.publish(Message(down(wanted.device, "blk"), payload, qos=0, expiry_s=int(LONGEST_S)))
        except ApplianceError as error:
            logger.info("a block for %s was not sent: %s", wanted.device, error)
            return
        await self._keep_to_cap(len(payload))

    def _read(self, wanted: Wanted) -> Block:
        path = self._folder / f"sha256-{wanted.digest}"
        data = b""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                data = os.pread(descriptor, BLOCK_BYTES, wanted.block * BLOCK_BYTES)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("the released file %s cannot be read: %s", path, error)
        return Block(wanted.digest, wanted.block, data, wanted.sent, "" if data else GONE)

    async def _keep_to_cap(self, size: int) -> None:
        if not self._bytes_per_s:
            return
        now = self._clock.monotonic()
        self._free_at = max(self._free_at, now) + size / self._bytes_per_s
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


def plug_blocks(means: Means) -> Blocks:
    """Serve the files of releases."""
    settings = means.settings
    return Blocks(
        settings.data_dir / "blobs",
        means.link,
        means.clock,
        bytes_per_s=settings.blocks_bytes_per_s,
        refuse=means.complaints.refuse,
    )
