"""Checking the indexes of a store against the truth, and making them anew, for an administrator who has doubts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from appliance.retrieval.parts import Keywords, Turns, VectorIndexes
from appliance.retrieval.truth import StoredTexts
from appliance.store.database import Database


class Upkeep:
    """Works on the indexes while searches go on."""

    def __init__(self, database: Database, keywords: Keywords, vectors: VectorIndexes, turns: Turns) -> None:
        """Derive the indexes from the database."""
        self._texts = StoredTexts(database)
        self._keywords = keywords
        self._vectors = vectors
        self._turns = turns

    async def rebuild(self, store: int) -> None:
        """Make the vector index of a store anew, and the keyword index, which is one for all stores."""
        async with self._turns.keywords:
            await asyncio.to_thread(self._rebuild_keywords)
        async with self._turns.vectors:
            await asyncio.to_thread(self._vectors.rebuild, store)

    def _rebuild_keywords(self) -> None:
        self._keywords.rebuild(self._texts.rows(self._texts.ids()))

    async def verify(self, store: int) -> Sequence[str]:
        """Return what is wrong with the keyword index, with a store's part of it, and with its vector index."""
        async with self._turns.keywords:
            problems = await asyncio.to_thread(self._verify_keywords, store)
        async with self._turns.vectors:
            return [*problems, *await asyncio.to_thread(self._vectors.verify, store)]

    def _verify_keywords(self, store: int) -> list[str]:
        problems = self._keywords.verify()
        wanted = self._texts.ids(store)
        missing = np.setdiff1d(wanted, self._keywords.chunk_ids(store), assume_unique=True)
        if len(missing):
            problems.append(f"{len(missing):,} of {len(wanted):,} chunks are missing in the keyword index.")
        return problems
