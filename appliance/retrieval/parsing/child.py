"""A running process that takes text from files, seen by its parent, which believes nothing that it says."""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec
import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import InvalidRequestError
from appliance.retrieval.parsing.document import BETWEEN, Block, ParsedDocument
from appliance.retrieval.parsing.protocol import (
    HEADER_BYTES,
    LARGEST_FRAME,
    LONGEST_SIDE,
    MOST_PICTURES,
    STRIDE,
    End,
    Job,
    Look,
    Piece,
    Pieces,
    Strip,
    to_frame,
)
from appliance.retrieval.parts import ParserDownError

START_TIMEOUT_S = 60.0
"""For Python to start; well under a second, but slow storage may be busy."""

_PASSED_ON = ("LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""All that the process may see of the environment."""
_DECODER = msgspec.json.Decoder(Pieces | Strip | End)


class ChildDiedError(InvalidRequestError):
    """The child ended in the middle of a file, or said what it should not."""

    default_code = "invalid_file"


class ParserChild:
    """A running `process`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self.files = 0

    @classmethod
    async def start(cls) -> ParserChild:
        """Start a process and wait until it is ready.

        Raises:
            ParserDownError: It cannot be started.
        """
        advice = "The machine may be out of memory or processes; `appliance doctor` looks."
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-m",
                "appliance.retrieval.parsing.process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                start_new_session=True,  # Ctrl-C in a terminal is for the server alone
            )
        except OSError as error:
            raise ParserDownError(
                f"The process that takes text from files cannot be started: {error.strerror}.", advice=advice
            ) from error
        child = cls(process)
        ready = False
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await child._receive()
            ready = True
        except (TimeoutError, ChildDiedError) as error:
            raise ParserDownError("The process that takes text from files did not start.", advice=advice) from error
        finally:
            if not ready:
                await child.stop()
        return child

    @property
    def is_running(self) -> bool:
        """Return False once the process has ended."""
        return self._process.returncode is None

    async def parse(self, job: Job) -> tuple[ParsedDocument, End]:
        """Have a file read; return what was found, and how it went.

        Raises:
            ChildDiedError: The process ended, or is out of step.
        """
        await self._send(job)
        found = _Assembly(job.max_characters)
        while not isinstance(message := await self._receive(), End):
            if isinstance(message, Strip):
                raise _died()
            for piece in message.pieces:
                found.add(piece)
        return ParsedDocument(tuple(found.blocks), message.title, tuple(message.pages_without_text)), message

    async def look(self, look: Look) -> tuple[list[NDArray[np.uint8]], End]:
        """Have the pictures on a page shown; return them, and how it went. Raises as `parse`."""
        await self._send(look)
        pictures = _Pictures()
        while not isinstance(message := await self._receive(), End):
            if isinstance(message, Pieces):
                raise _died()
            pictures.add(message)
        return pictures.whole(), message

    async def _send(self, job: Job | Look) -> None:
        self.files += 1
        if self._stdin.is_closing():
            raise _died()
        try:
            self._stdin.write(to_frame(job))
            await self._stdin.drain()
        except ConnectionError as error:
            raise _died() from error

    async def _receive(self) -> Pieces | Strip | End:
        try:
            length = int.from_bytes(await self._stdout.readexactly(HEADER_BYTES), "big")
            if length > LARGEST_FRAME:
                raise _died()
            message: Pieces | Strip | End = _DECODER.decode(await self._stdout.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError) as error:
            raise _died() from error
        return message

    def kill(self) -> None:
        """End the process; the loop reaps it."""
        if self.is_running:
            try:
                self._process.kill()
            except ProcessLookupError:
                return  # it ended just now
        self._stdin.close()

    async def stop(self) -> None:
        """Kill the process and wait for its end; a caller who is cancelled meanwhile leaves no zombie."""
        self.kill()
        while await self._stdout.read(LARGEST_FRAME):
            pass  # a pipe that is full is not closed before it is read to its end
        await self._process.wait()


class _Assembly:
    """Makes blocks of pieces, within the limit that the child was told."""

    def __init__(self, max_characters: int) -> None:
        self.blocks: list[Block] = []
        self._parts: list[str] = []
        self._left = max_characters + max_characters // 4 + 1024  # the child counts more exactly

    def add(self, piece: Piece) -> None:
        self._left -= len(piece.text) + len(BETWEEN)
        if self._left < 0:
            raise _died()
        self._parts.append(piece.text)
        if not piece.more:
            self.blocks.append(Block(piece.kind, "".join(self._parts), piece.page, piece.level))
            self._parts.clear()


class _Pictures:
    """Makes pictures of strips, within the limits that are agreed."""

    def __init__(self) -> None:
        self._pictures: list[NDArray[np.uint8]] = []
        self._size = (0, 0)
        self._rows = bytearray()

    def add(self, strip: Strip) -> None:
        size = (strip.height, strip.width)
        if self._rows:
            is_fit = size == self._size
        else:
            is_fit = len(self._pictures) < MOST_PICTURES and all(
                0 < side <= LONGEST_SIDE and side % STRIDE == 0 for side in size
            )
            self._size = size
        self._rows += strip.pixels
        if not is_fit or not strip.pixels or len(self._rows) > strip.height * strip.width:
            raise _died()
        if len(self._rows) == strip.height * strip.width:
            self._pictures.append(np.frombuffer(bytes(self._rows), np.uint8).reshape(size))
            self._rows.clear()

    def whole(self) -> list[NDArray[np.uint8]]:
        return self._pictures


def _died() -> ChildDiedError:
    return ChildDiedError("brought its reader down, most likely by using too much memory")
