"""A store changes its embedder: the old vectors answer until the new ones are all there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.core.errors import NotFoundError, OverloadedError
from appliance.core.retrieval import Reembedding
from tests.retrieval.boxes import Box, CountingEmbedder, box

pytestmark = pytest.mark.anyio

COUNT = 70
"""Passages: more than two batches."""

USED = "SELECT DISTINCT v.model, length(v.vector) FROM chunks c JOIN vectors v ON v.id = c.vector"


def another(**values: object) -> CountingEmbedder:
    return CountingEmbedder(model="other:1", dimensions=16, **values)  # type: ignore[arg-type]


async def prepared(folder: Path, stores: int = 1) -> str:
    """Fill stores with the first embedder, and return the last one's id."""
    async with box(folder) as each:
        file = await each.upload("\n\n".join(f"pump {number}" for number in range(COUNT)))
        for _ in range(stores):
            store = each.documents.stores.create(tenant="").id
            await each.add(store, file.id)
            await each.until_through(store)
    return store


def state(each: Box, store: str) -> Reembedding | None:
    return each.documents.stores.get(store, tenant="").reembedding


async def test_the_old_vectors_answer_until_the_new_are_complete(tmp_path: Path) -> None:
    store = await prepared(tmp_path)
    other = another(errors=[OverloadedError("busy", retry_after_s=0.01)])
    async with box(tmp_path, embedder=other, embedding_model="other", running=False) as each:
        begun = await each.documents.stores.reembed(store, tenant="")
        assert begun.reembedding == Reembedding("", 0, COUNT)
        with pytest.raises(OverloadedError):
            await each.documents._embedding_step()
        seen = []
        while (now := state(each, store)) is not None:
            seen.append(now.done)
            assert each.rows(USED) == [("embedder:1", 32)]
            assert each.documents.stores.get(store, tenant="").counts.completed == 1
            assert await each.documents._embedding_step()
        assert seen == [0, 1, 33, 65, 70]
        assert each.rows(USED) == [("other:1", 64)]
        assert each.rows("SELECT count(*) FROM vectors") == [(COUNT,)], "the old ones are gone"
        assert len(each.vectors.stores[1]) == COUNT
        assert {len(vector) for vector in each.vectors.stores[1].values()} == {16}
        found = each.documents.stores.get(store, tenant="")
        texts = sum(len(f"pump {number}") for number in range(COUNT))
        assert (found.model, found.usage) == ("other:1", texts + 64 * COUNT)
        assert other.texts.total() == COUNT


async def test_a_second_wish_goes_on_with_the_first_and_one_for_another_model_begins_anew(tmp_path: Path) -> None:
    store = await prepared(tmp_path)
    async with box(tmp_path, embedder=another(), embedding_model="other", running=False) as each:
        await each.documents.stores.reembed(store, tenant="")
        await each.documents._embedding_step()
        await each.documents._embedding_step()
        again = await each.documents.stores.reembed(store, tenant="")
        assert again.reembedding == Reembedding("other:1", 33, COUNT)
    async with box(tmp_path, embedder=CountingEmbedder(model="third:1"), embedding_model="third") as each:
        each.database.write_blocking(lambda write: write.execute("UPDATE stores SET lease_until = 0").fetchall())
        await each.documents.stores.reembed(store, tenant="")
        await each.until_reembedded(store)
        assert each.rows("SELECT DISTINCT model, length(vector) FROM vectors") == [("third:1", 32)]


async def test_a_store_that_shares_its_vectors_with_another_leaves_them_to_it(tmp_path: Path) -> None:
    store = await prepared(tmp_path, stores=2)
    async with box(tmp_path, embedder=another(), embedding_model="other") as each:
        await each.documents.stores.reembed(store, tenant="")
        await each.until_reembedded(store)
        found = each.rows("SELECT model, count(*) FROM vectors GROUP BY model")
        assert found == [("embedder:1", COUNT), ("other:1", COUNT)]


async def test_files_that_come_and_go_meanwhile_are_there_and_gone(tmp_path: Path) -> None:
    store = await prepared(tmp_path)
    gate = asyncio.Event()
    async with box(tmp_path, embedder=another(gate=gate), embedding_model="other") as each:
        await each.documents.stores.reembed(store, tenant="")
        new, short = await each.upload("a new valve"), await each.upload("a short-lived fan")
        await each.add(store, new.id, short.id)
        await each.until(lambda: each.keyword_hits("valve") == ["a new valve"])
        await each.documents.files.delete(short.id, tenant="")
        gate.set()
        await each.until_reembedded(store)
        assert each.rows("SELECT count(*) FROM chunks WHERE vector IS NOT NULL") == [(COUNT + 1,)]
        assert each.rows("SELECT count(*) FROM vectors") == [(COUNT + 1,)]
        assert each.documents.stores.get_file(store, new.id, tenant="").embedded == 1


async def test_what_is_deleted_meanwhile_leaves_neither_old_nor_next_vector(tmp_path: Path) -> None:
    store = await prepared(tmp_path)
    async with box(tmp_path, embedder=another(), embedding_model="other", running=False) as each:
        await each.documents.stores.reembed(store, tenant="")
        await each.documents._embedding_step()
        await each.documents._embedding_step()
        assert each.rows("SELECT count(*) FROM vectors") == [(COUNT + 33,)]
        [file] = each.documents.files.list(tenant="")[0]
        await each.documents.files.delete(file.id, tenant="")
        assert each.rows("SELECT count(*) FROM vectors") == [(0,)]


async def test_a_model_that_is_not_there_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    class NoModel(CountingEmbedder):
        async def count_tokens(self, model: str, texts: object) -> list[int]:
            raise NotFoundError(f"There is no model {model}.")

    store = await prepared(tmp_path)
    async with box(tmp_path, embedder=NoModel(), embedding_model="other", running=False) as each:
        with pytest.raises(NotFoundError, match="no model other"):
            await each.documents.stores.reembed(store, tenant="")
        assert state(each, store) is None
        with pytest.raises(NotFoundError, match="vector store"):
            await each.documents.stores.reembed("vs_none", tenant="")


async def test_a_model_that_goes_in_the_middle_leaves_the_old_vectors(tmp_path: Path) -> None:
    store = await prepared(tmp_path)
    other = another()
    async with box(tmp_path, embedder=other, embedding_model="other", running=False) as each:
        await each.documents.stores.reembed(store, tenant="")
        await each.documents._embedding_step()
        other.errors.append(NotFoundError("it was removed"))
        await each.documents._embedding_step()
        assert state(each, store) is None
        assert each.rows(USED) == [("embedder:1", 32)]
        assert each.rows("SELECT count(*) FROM vectors") == [(COUNT,)]


async def test_a_model_that_changes_in_the_middle_begins_anew(tmp_path: Path) -> None:
    store = await prepared(tmp_path)
    other = another()
    async with box(tmp_path, embedder=other, embedding_model="other") as each:
        other.gate = asyncio.Event()
        await each.documents.stores.reembed(store, tenant="")
        other.gate.set()
        await each.until(lambda: (now := state(each, store)) is None or now.done > 0)
        other.model, other.dimensions = "other:2", 24
        await each.until_reembedded(store)
        lengths = each.rows("SELECT model, length(vector), count(*) FROM vectors GROUP BY model, length(vector)")
        assert lengths in ([("other:2", 96, COUNT)], [("other:1", 64, COUNT)])


async def test_a_text_that_the_new_model_does_not_take_is_found_by_keyword_and_said(tmp_path: Path) -> None:
    store = await prepared(tmp_path)
    async with box(tmp_path, embedder=another(poison="pump 17"), embedding_model="other") as each:
        await each.documents.stores.reembed(store, tenant="")
        await each.until_reembedded(store)
        [[file]] = [
            each.documents.stores.list_files(
                store, tenant="", batch="", status="", limit=9, after="", newest_first=True
            )[0]
        ]
        assert (file.status, file.embedded, file.chunks) == ("failed", COUNT - 1, COUNT)
        assert file.error == f"1 of {COUNT} passages cannot be embedded by other:1; they are found by keyword."
        assert each.keyword_hits("17") == ["pump 17"]


async def test_a_model_that_takes_no_text_at_all_leaves_the_old_vectors(tmp_path: Path) -> None:
    store = await prepared(tmp_path)
    async with box(tmp_path, embedder=another(poison="pump"), embedding_model="other") as each:
        await each.documents.stores.reembed(store, tenant="")
        await each.until_reembedded(store)
        assert each.rows(USED) == [("embedder:1", 32)]
        assert each.documents.stores.get(store, tenant="").model == "embedder:1"
