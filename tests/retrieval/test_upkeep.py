"""An administrator's check finds what an index lacks, and a rebuild mends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.errors import NotFoundError
from tests.retrieval.boxes import Box, box

pytestmark = pytest.mark.anyio


async def filled(one: Box) -> str:
    """Return a store with two files that are through."""
    store = one.documents.stores.create(tenant="").id
    files = [(await one.upload(f"heat pump {each}\n\nfilter {each}", f"{each}.txt")).id for each in range(2)]
    await one.add(store, *files)
    await one.until_through(store)
    return store


async def test_indexes_that_are_whole_are_found_so(tmp_path: Path) -> None:
    async with box(tmp_path) as one:
        assert await one.documents.stores.verify(await filled(one), tenant="") == []


async def test_chunks_that_the_indexes_lack_are_found_and_brought_back(tmp_path: Path) -> None:
    async with box(tmp_path) as one:
        store = await filled(one)
        hits = one.keyword_hits("heat")
        [first, *_] = [int(str(row[0])) for row in one.rows("SELECT id FROM chunks ORDER BY id")]
        one.keywords.remove([first])
        one.vectors.stores[1].pop(first)
        problems = await one.documents.stores.verify(store, tenant="")
        assert len(problems) == 2
        assert "1 of " in problems[0]
        await one.documents.stores.rebuild(store, tenant="")
        assert await one.documents.stores.verify(store, tenant="") == []
        assert one.keyword_hits("heat") == hits


async def test_anothers_store_is_neither_checked_nor_rebuilt(tmp_path: Path) -> None:
    async with box(tmp_path) as one:
        store = await filled(one)
        for work in (one.documents.stores.verify, one.documents.stores.rebuild):
            with pytest.raises(NotFoundError, match=store):
                await work(store, tenant="another")


async def test_an_administrator_checks_and_rebuilds_the_store_of_any_tenant(tmp_path: Path) -> None:
    async with box(tmp_path) as one:
        store = one.documents.stores.create(tenant="another").id
        await one.add(store, (await one.upload("heat pump", tenant="another")).id, tenant="another")
        await one.until(lambda: one.rows("SELECT stage FROM store_files") == [("done",)])
        one.keywords.remove([1])
        assert len(await one.documents.stores.verify(store, tenant=None)) == 1
        assert (await one.documents.stores.rebuild(store, tenant=None)).id == store
        assert await one.documents.stores.verify(store, tenant=None) == []
