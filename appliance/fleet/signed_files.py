"""Files of the signed repository, asked for slice by slice: of the hub, or of a folder that somebody brought.

Nothing here is believed; what is held off are answers without end: more than the file may have, slices that are cut
short, and an hour's drip.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from appliance.core.errors import UnavailableError, UntrustedError
from appliance.core.fleet import BLOCK_BYTES, Answer, Question
from appliance.fleet.part import Asking
from appliance.security.repository_files import read_slice

FILE_TIMEOUT_S = 120.0


class FolderAsking:
    """Answers out of a copy of the repository on a stick or a share; it does not know the time."""

    def __init__(self, folder: Path) -> None:
        """Answer from the folder that has `metadata` and `targets` in it."""
        self._folder = folder

    async def ask(self, question: Question, *, timeout_s: float = 10.0) -> Answer:  # noqa: ARG002
        """Return a slice of a file; there is nobody for other questions.

        Raises:
            UnavailableError: It is no question for a file.
        """
        if question.kind != "file":
            raise UnavailableError(f"A folder has no answer to {question.kind!r}.")
        return await asyncio.to_thread(read_slice, self._folder, question.path, question.offset)


class SignedFiles:
    """Reads whole files.

    Attributes:
        hub_time: Unix seconds that the hub's last answer gave, 0 before that.
    """

    def __init__(self, asking: Asking, *, timeout_s: float = FILE_TIMEOUT_S) -> None:
        """Ask for files, each of which has to be whole after `timeout_s`."""
        self._asking = asking
        self._timeout_s = timeout_s
        self.hub_time = 0.0

    async def fetch(self, path: str, most: int) -> bytes | None:
        """Return a file, or None if the repository has none of that path.

        Args:
            path: In the repository.
            most: Bytes that it may have.

        Raises:
            UnavailableError: The hub is away, or too slow.
            UntrustedError: It is larger than it may be, or the answers make no file.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._whole(path, most)
        except TimeoutError as error:
            raise UnavailableError(
                f"{path} did not come within {self._timeout_s:g} s.", advice="It is tried again.", code="hub_slow"
            ) from error

    async def _whole(self, path: str, most: int) -> bytes | None:
        data = bytearray()
        while True:
            answer = await self._asking.ask(Question("file", path, len(data)))
            self.hub_time = answer.now
            if not answer.ok:
                return self._refused(path, answer)
            if answer.total > most:
                raise UntrustedError(
                    f"{path} has {answer.total:,} bytes, and {most:,} are allowed.", code="wrong_content"
                )
            wanted = min(BLOCK_BYTES, answer.total - len(data))
            if len(answer.data) != wanted:
                raise UntrustedError(
                    f"{len(answer.data):,} bytes of {path} came where {wanted:,} are due.",
                    advice="It may have been replaced meanwhile; then the next try gets it whole.",
                    code="wrong_content",
                )
            data += answer.data
            if len(data) == answer.total:
                return bytes(data)

    @staticmethod
    def _refused(path: str, answer: Answer) -> None:
        if answer.code != "not_found":
            raise UnavailableError(f"The hub does not give out {path}: {answer.code!r:.60} {answer.detail!r:.200}.")
