"""The signed repository inside the running hub: gives out its files, and signs snapshot and timestamp again in time."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, UnavailableError
from appliance.core.fleet import Answer, Question, UpKind
from appliance.core.messaging import Message
from appliance.hub.authority import Authority
from appliance.security.repository_files import read_slice

if TYPE_CHECKING:
    from appliance.hub.room import Means

logger = logging.getLogger("appliance.hub")

CHECK_S = 3600.0
RETRY_S = 60.0


class SignedRepository:
    """A part of the hub that reads no topic: devices ask for files through `Questions`."""

    kinds: frozenset[UpKind] = frozenset()

    def __init__(self, authority: Authority, clock: Clock) -> None:
        """Give out and keep fresh one repository; it may come into being later."""
        self._authority = authority
        self._clock = clock

    async def answer(self, _device: str, question: Question) -> Answer:
        """Return a slice of a file of the repository.

        Raises:
            UnavailableError: There is no repository yet.
            StorageError: The disk failed.
        """
        repository = self._authority.repository
        if not repository.exists:
            raise UnavailableError("This hub has no signed repository.", advice="`appliance hub init` makes one.")
        return await asyncio.to_thread(
            read_slice, repository.folder, question.path, question.offset, now=self._clock.unix()
        )

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:
        """Take nothing."""

    async def run(self) -> None:
        """Look every hour whether something has to be signed again."""
        while True:
            pause_s = await self._look()
            await asyncio.sleep(pause_s)

    async def _look(self) -> float:
        if not self._authority.repository.exists:
            return RETRY_S
        try:
            await asyncio.to_thread(self._authority.sign_when_due)
        except ApplianceError as error:
            logger.error("The signed repository could not be signed again: %s", error)  # noqa: TRY400 (advice, no trace)
            return RETRY_S
        return CHECK_S


def plug_repository(means: Means) -> SignedRepository:
    """Make the part and answer questions for files."""
    part = SignedRepository(Authority(Path(means.settings.data_dir), means.clock), means.clock)
    means.questions.answer_with("file", part.answer)
    return part
