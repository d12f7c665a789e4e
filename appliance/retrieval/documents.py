"""Files and vector stores as one thing: what they are made of, and the work that goes on behind the doors.

compose ─► Documents ─► files, stores        for the doors
                     ─► run                  three loops: keyword part, vectors, erasure; and what is past its time
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from itertools import groupby

import numpy as np

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.core.types import EmbeddingModels
from appliance.retrieval import jobs
from appliance.retrieval.embedding import Embedding
from appliance.retrieval.erasure import Erasure
from appliance.retrieval.files import UploadedFiles
from appliance.retrieval.ingest import PASSING, Ingest
from appliance.retrieval.jobs import Claims
from appliance.retrieval.parts import Cut, Keywords, Parser, Searcher, TokenCounter, Turns, VectorIndexes
from appliance.retrieval.reembedding import Reembedding
from appliance.retrieval.stores import Stores
from appliance.retrieval.truth import StoredTexts
from appliance.retrieval.upkeep import Upkeep
from appliance.store.database import Connection, Database

LOGGER = logging.getLogger("appliance.retrieval")

LEASE_S = 30.0
"""How long a claim outlives its worker; it is renewed three times as often."""

LOOK_EVERY_S = 5.0
"""How often the loops look for work that nobody told them of: what an error had them put back."""

SWEEP_EVERY_S = 60.0
"""How often what is past its time is looked for."""

BACK_OFF_S = (1.0, 60.0)
"""First and longest wait after an error that passes and does not say when."""


class Documents:
    """Owns what is taken in and what is erased. Made and used on one event loop."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        clock: Clock,
        *,
        parser: Parser,
        cut: Cut,
        counter: TokenCounter,
        models: EmbeddingModels,
        keywords: Keywords,
        vectors: VectorIndexes,
        searcher: Searcher,
        lease_s: float = LEASE_S,
    ) -> None:
        """Connect the parts; nothing runs yet.

        Args:
            settings: The folder, `max_file_bytes` and `embedding_model`.
            database: As `schema.open_retrieval` returns it.
            clock: For ages and claims.
            parser: Takes text from files.
            cut: Cuts text into chunks.
            counter: Counts in the embedder's tokens.
            models: Whatever embeds.
            keywords: The keyword index.
            vectors: The vector indexes.
            searcher: Searches.
            lease_s: How long a claim outlives its worker.
        """
        folder = settings.data_dir / "files"
        turns = Turns()
        claims = Claims(secrets.token_hex(8), lease_s)
        self._database = database
        self._clock = clock
        self._claims = claims
        self._keywords = keywords
        self._vectors = vectors
        self._turns = turns
        self._take_in = asyncio.Event()
        self._embed = asyncio.Event()
        self._erasure = Erasure(database, folder, keywords, vectors, turns)
        self._ingest = Ingest(
            database,
            folder,
            clock,
            claims,
            parser=parser,
            cut=cut,
            counter=counter,
            embedder=settings.embedding_model,
            keywords=keywords,
            turns=turns,
        )
        self._embedding = Embedding(
            database,
            clock,
            claims,
            models=models,
            embedder=settings.embedding_model,
            vectors=vectors,
            turns=turns,
        )
        self._reembedding = Reembedding(
            database, clock, claims, embedding=self._embedding, vectors=vectors, turns=turns
        )
        loop = asyncio.get_running_loop()
        self.files = UploadedFiles(database, folder, settings.max_file_bytes, clock, self._erasure)
        self.stores = Stores(
            database,
            clock,
            self._erasure,
            searcher=searcher,
            upkeep=Upkeep(database, keywords, vectors, turns),
            embedder=settings.embedding_model,
            counter=counter,
            on_work=lambda: loop.call_soon_threadsafe(self._on_work),  # files are added from other threads too
        )

    def _on_work(self) -> None:
        self._take_in.set()
        self._embed.set()
        self._erasure.wake()

    async def run(self) -> None:
        """Take files in, erase and sweep until cancelled; then whoever runs next goes on at once.

        Raises:
            BaseExceptionGroup: A loop died.
        """
        await self._database.write(jobs.take_over)
        try:
            await self._run()
        finally:
            await self._give_back()

    async def _give_back(self) -> None:
        try:
            await self._database.write(lambda each: jobs.release(each, self._claims))
        except ApplianceError as error:
            LOGGER.warning("files that were begun count as tried once more: %s", error)

    async def _run(self) -> None:
        await asyncio.to_thread(self.files.remove_garbage)
        await self.check_keywords()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._erasure.run(), name="erasure")
            tasks.create_task(self._work(self._keyword_step, self._take_in), name="ingest")
            tasks.create_task(self._work(self._embedding_step, self._embed), name="ingest embedding")
            tasks.create_task(self._every(self._claims.lease_s / 3, self._renew), name="ingest claims")
            tasks.create_task(self._every(SWEEP_EVERY_S, self._sweep), name="expiry")

    async def _keyword_step(self) -> bool:
        worked = await self._ingest.step()
        if worked:
            self._embed.set()
        return worked

    async def _embedding_step(self) -> bool:
        return await self._embedding.step() or await self._reembedding.step()

    async def _work(self, step: Callable[[], Awaitable[bool]], wake: asyncio.Event) -> None:
        """Do what there is to do; after an error that passes, wait as long as it says, or ever longer."""
        first, longest = BACK_OFF_S
        wait_s = first
        while True:
            wake.clear()
            try:
                worked = await step()
            except PASSING as error:
                pause_s = error.retry_after_s or wait_s
                LOGGER.warning("taking files in waits %g s: %s", pause_s, error)
                wait_s = min(2 * wait_s, longest)
                await asyncio.sleep(pause_s)
                continue
            wait_s = first
            if not worked:
                await _wait(wake, LOOK_EVERY_S)

    async def _every(self, period_s: float, action: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await action()
            except PASSING as error:
                LOGGER.warning("%s", error)
            await asyncio.sleep(period_s)

    async def _renew(self) -> None:
        now = self._clock.unix()
        await self._database.write(lambda each: jobs.renew(each, self._claims, now))

    async def _sweep(self) -> None:
        """Erase the files and stores that are past their time."""

        def remove(connection: Connection) -> int:
            return self.files.remove_expired(connection) + self.stores.remove_expired(connection)

        while await self._database.write(remove):
            self._erasure.wake()

    async def check_keywords(self) -> None:
        """Bring the keyword index to what the truth has: what a killed process had not written, or too much."""
        async with self._turns.keywords:
            await asyncio.to_thread(self._check_keywords)

    def _check_keywords(self) -> None:
        texts = StoredTexts(self._database)
        if self._keywords.verify():
            self._keywords.rebuild(texts.rows(texts.ids()))
            return
        here, wanted = self._keywords.chunk_ids(), texts.ids()
        surplus = np.setdiff1d(here, wanted, assume_unique=True)
        if len(surplus):
            self._keywords.remove(surplus.tolist())
            self._keywords.erase()
        missing = texts.rows(np.setdiff1d(wanted, here, assume_unique=True))
        for store, rows in groupby(missing, key=lambda row: row[0]):
            self._keywords.add(store, [(chunk, text) for _, chunk, text in rows])


async def _wait(event: asyncio.Event, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return
