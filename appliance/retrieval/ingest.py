"""A file becomes searchable: by keyword at once, by meaning when its vectors have caught up.

    parse → cut → one transaction for the chunks → keyword index          (`Ingest`: all that waits, oldest first)
    waiting chunks → vectors, some at a time → one transaction → vector index          (`embedding.Embedding`)

Each arrow can be done again, so a process that dies costs what it had in hand and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from appliance.core.clock import Clock
from appliance.core.errors import (
    ApplianceError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    StorageError,
    UnavailableError,
)
from appliance.retrieval import jobs
from appliance.retrieval.jobs import Claims, Job
from appliance.retrieval.parsing.document import ParsedDocument
from appliance.retrieval.parts import Cut, Keywords, Parser, ParserDownError, Piece, TokenCounter, Turns
from appliance.store.database import Database

LOGGER = logging.getLogger("appliance.retrieval")

MOST_FILES = 64
"""Files of one transaction, and of one addition to the keyword index."""

MOST_CHARACTERS = 4_000_000
"""Text of one transaction, from which on no further file is taken into it."""

PASSING = (OverloadedError, UnavailableError, DeadlineExceededError, StorageError)
"""Errors that pass by themselves, or when somebody has made room."""


class Ingest:
    """Takes files in as far as keyword search needs it."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        clock: Clock,
        claims: Claims,
        *,
        parser: Parser,
        cut: Cut,
        counter: TokenCounter,
        embedder: str,
        keywords: Keywords,
        turns: Turns,
    ) -> None:
        """Take in what is queued in the database.

        Args:
            database: `retrieval.db`.
            folder: Of uploaded files.
            clock: For claims.
            claims: This worker's.
            parser: Takes text from files.
            cut: Cuts text into chunks.
            counter: Counts in the embedder's tokens.
            embedder: The model that embeds new stores.
            keywords: The keyword index.
            turns: At the indexes.
        """
        self._database = database
        self._folder = folder
        self._clock = clock
        self._claims = claims
        self._parser = parser
        self._cut = cut
        self._counter = counter
        self._embedder = embedder
        self._keywords = keywords
        self._turns = turns

    async def step(self) -> bool:
        """Take in some files, and return whether there were any.

        Raises:
            ApplianceError: One of `PASSING`; what was begun can be claimed again at once, but for files that were tried
                so often with a parser that does not start: they have failed.
        """
        try:
            return await self._index(await self._claim("cut", MOST_FILES)) or await self._take_in()
        except ParserDownError as error:
            message = str(error)
            await self._database.write(lambda each: jobs.end_try(each, self._claims, "server_error", message))
            raise
        except PASSING:
            await self._database.write(lambda each: jobs.release(each, self._claims))
            raise

    async def _claim(self, stage: str, limit: int) -> list[Job]:
        now = self._clock.unix()
        return await self._database.write(lambda each: jobs.claim(each, self._claims, now, stage, limit))

    async def _take_in(self) -> bool:
        """Parse and cut files, keep their chunks, and add them to the keyword index."""
        claimed = await self._claim("queued", MOST_FILES)
        finished: list[tuple[Job, Sequence[Piece]]] = []
        characters = 0
        for asked in claimed:
            job = await self._fitting(asked)
            pieces = await self._pieces(job)
            if pieces is None:
                continue
            finished.append((job, pieces))
            characters += sum(len(each.text) for each in pieces)
            if characters >= MOST_CHARACTERS:
                await self._keep(finished)
                finished, characters = [], 0
        await self._keep(finished)
        return bool(claimed)

    async def _fitting(self, job: Job) -> Job:
        """Return the job with chunks that the embedder reads to their end; it would cut off the rest."""
        try:
            longest = await self._counter.longest_input(job.model or self._embedder)
        except PASSING:
            raise
        except ApplianceError:  # no embedder yet, or one that fails, which counting says again
            return job
        return replace(job, chunking=job.chunking.within(longest))

    async def _pieces(self, job: Job) -> Sequence[Piece] | None:
        """Return the chunks of a file, or None having noted why there are none."""
        if job.attempts > jobs.MOST_ATTEMPTS:
            await self._fail(job, "server_error", f"It was begun {jobs.MOST_ATTEMPTS} times and never came through.")
            return None
        try:
            document = await self._parser.parse(self._folder / job.file, job.filename, job.media_type)
            return await self._chunks(job, document)
        except PASSING:
            raise
        except InvalidRequestError as error:
            code = error.code if error.code in ("unsupported_file", "invalid_file") else "invalid_file"
            await self._fail(job, code, str(error))
        except ApplianceError as error:
            await self._fail(job, "server_error", str(error))
        return None

    async def _fail(self, job: Job, code: str, message: str) -> None:
        await self._database.write(lambda each: jobs.fail(each, job.key, code, message))

    async def _chunks(self, job: Job, document: ParsedDocument) -> Sequence[Piece]:
        loop = asyncio.get_running_loop()
        model = job.model or self._embedder

        def count(texts: Sequence[str]) -> Sequence[int]:
            return asyncio.run_coroutine_threadsafe(self._count(model, texts), loop).result()

        return await asyncio.to_thread(self._cut, document, job.chunking, count)

    async def _count(self, model: str, texts: Sequence[str]) -> Sequence[int]:
        try:
            return await self._counter.count_tokens(model, texts)
        except NotFoundError:  # no embedder: chunks of about the same size for the keyword index alone
            return [estimated_tokens(each) for each in texts]

    async def _keep(self, finished: Sequence[tuple[Job, Sequence[Piece]]]) -> None:
        await self._database.write(lambda each: jobs.keep_chunks(each, self._claims, finished))
        await self._index([job for job, _ in finished])

    async def _index(self, cut: Sequence[Job]) -> bool:
        """Add the chunks of files to the keyword index; those that an earlier attempt added are replaced."""
        if not cut:
            return False
        keys = [job.key for job in cut]
        async with self._turns.keywords:  # what is removed meanwhile is removed from the index behind this
            found = self._database.read(lambda each: jobs.cut_chunks(each, keys))
            await asyncio.to_thread(self._add, found, any(job.attempts > 1 for job in cut))
        await self._database.write(lambda each: jobs.note_keywords(each, keys))
        return True

    def _add(self, found: dict[int, list[tuple[int, str]]], again: bool) -> None:
        for store, rows in found.items():
            if again:
                self._keywords.remove([chunk for chunk, _ in rows])
            self._keywords.add(store, rows)


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has for an embedder that is not known."""
    ascii_characters = sum(1 for each in text if each.isascii())
    return 1 + ascii_characters // 4 + (len(text) - ascii_characters)
