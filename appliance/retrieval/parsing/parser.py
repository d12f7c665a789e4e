"""Files become text, one at a time, in a child process that may be killed.

Whatever a file does there, it costs at most its time limit and the child; the next file gets a fresh one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import InvalidRequestError, UnavailableError
from appliance.core.printable import printable
from appliance.core.settings import Settings
from appliance.retrieval.parsing.child import ChildDiedError, ParserChild
from appliance.retrieval.parsing.document import ParsedDocument
from appliance.retrieval.parsing.protocol import End, Job, Look

T = TypeVar("T")

FILES_PER_CHILD = 200
"""A child that has read so many makes room for a fresh one, lest what its libraries keep adds up."""
IDLE_S = 30.0
"""A child that has nothing to do for so long ends, for it holds some 60 MB."""


class DocumentParser:
    """Takes text from files, one at a time."""

    def __init__(self, settings: Settings) -> None:
        """Keep the limits; nothing is started yet."""
        self._max_characters = settings.max_document_characters
        self._timeout_s = settings.document_timeout_s
        self._child: ParserChild | None = None
        self._lock = asyncio.Lock()
        self._retirement: asyncio.TimerHandle | None = None
        self._closed = False

    async def parse(self, path: Path, filename: str, media_type: str) -> ParsedDocument:
        """Return the text of a file. Leaving ends the work.

        Args:
            path: Where it lies.
            filename: As its owner calls it, for messages.
            media_type: As `sniff` found it.

        Raises:
            InvalidRequestError: `unsupported_file`, no text is taken from its type; or `invalid_file`, it is damaged,
                hostile or over a limit.
            ParserDownError: The child cannot be started.
            UnavailableError: The parser is closed.
        """
        job = Job(str(path), media_type, self._timeout_s, self._max_characters)
        return await self._ask(lambda child: child.parse(job), filename)

    async def show(self, path: Path, filename: str, media_type: str, page: int) -> list[NDArray[np.uint8]]:
        """Return the pictures on a page, grey, shape (height, width). Raises as `parse`."""
        look = Look(str(path), media_type, page, self._timeout_s)
        return await self._ask(lambda child: child.look(look), filename)

    async def _ask(self, ask: Callable[[ParserChild], Awaitable[tuple[T, End]]], filename: str) -> T:
        async with self._lock:
            self._stay()
            try:
                found, end = await self._ask_with_retry(ask, printable(filename))
            finally:
                self._retire_later()
        if end.problem is not None:
            raise InvalidRequestError(
                f"{printable(filename)} {end.message}.",
                advice=end.advice,
                code="unsupported_file" if end.problem == "unsupported_file" else "invalid_file",
                param="file",
            )
        return found

    async def close(self) -> None:
        """End the child. Idempotent; waits for a file that is being parsed."""
        async with self._lock:
            self._closed = True
            self._stay()
            await self._discard_child()

    async def _ask_with_retry(
        self, ask: Callable[[ParserChild], Awaitable[tuple[T, End]]], filename: str
    ) -> tuple[T, End]:
        """Ask the child; if one that had been well is found dead, ask a fresh one: another file may be to blame."""
        was_used = self._child is not None and self._child.files > 0
        try:
            return await self._ask_once(ask, filename)
        except ChildDiedError as error:
            if not was_used:
                raise _named(error, filename) from error
        try:
            return await self._ask_once(ask, filename)
        except ChildDiedError as error:
            raise _named(error, filename) from error

    async def _ask_once(self, ask: Callable[[ParserChild], Awaitable[tuple[T, End]]], filename: str) -> tuple[T, End]:
        """Have one file read; on anything but an answer the child is out of step, so it ends."""
        child = await self._ready_child()
        answered = False
        try:
            async with asyncio.timeout(self._timeout_s):
                found, end = await ask(child)
            answered = end.problem != "invalid_file"
        except TimeoutError as error:
            raise InvalidRequestError(
                f"{filename} was not read within {self._timeout_s:g} s.",
                advice="Split it, or raise `document_timeout_s`.",
                code="invalid_file",
                param="file",
            ) from error
        finally:
            if not answered:
                await self._discard_child()
        return found, end

    async def _ready_child(self) -> ParserChild:
        if self._closed:
            raise UnavailableError("The server is stopping.", advice="Send the request again.", retry_after_s=1.0)
        if self._child is not None and (not self._child.is_running or self._child.files >= FILES_PER_CHILD):
            await self._discard_child()
        if self._child is None:
            self._child = await ParserChild.start()
        return self._child

    async def _discard_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.stop()

    def _retire_later(self) -> None:
        if self._child is not None:
            self._retirement = asyncio.get_running_loop().call_later(IDLE_S, self._child.kill)

    def _stay(self) -> None:
        if self._retirement is not None:
            self._retirement.cancel()
        self._retirement = None


def _named(error: ChildDiedError, filename: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{filename} {error.message}.", advice="Split it into several files.", code="invalid_file", param="file"
    )
