"""Files become searchable: in order, once each, beside errors that pass and errors that do not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.core.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from appliance.core.retrieval import Chunking, NewStoreFile
from appliance.retrieval import documents
from appliance.retrieval.jobs import MOST_ATTEMPTS
from appliance.retrieval.parts import ParserDownError
from tests.retrieval.boxes import CountingEmbedder, box

pytestmark = pytest.mark.anyio


async def test_a_file_is_searchable_by_keyword_and_has_its_vectors(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        file = await each.upload("The pump needs oil.\n\nValve B7 opens at 4 bar.")
        await each.add(store.id, file.id)
        await each.until_through(store.id)
        found = each.documents.stores.get_file(store.id, file.id, tenant="")
        assert (found.status, found.chunks, found.embedded) == ("completed", 2, 2)
        assert each.keyword_hits("valve") == ["Valve B7 opens at 4 bar."]
        assert sorted(each.vectors.stores[1]) == [1, 2]
        kept = each.documents.stores.get(store.id, tenant="")
        assert (kept.model, kept.usage) == ("embedder:1", 43 + 2 * 4 * 8)
        texts = each.documents.stores.file_text(store.id, file.id, tenant="")
        assert texts == ["The pump needs oil.", "Valve B7 opens at 4 bar."]


async def test_chunks_are_cut_no_longer_than_the_embedder_reads(tmp_path: Path) -> None:
    async with box(tmp_path, embedder=CountingEmbedder(longest=160)) as each:
        store = each.documents.stores.create(tenant="")
        wanted = [Chunking(), Chunking(800, 400), Chunking(120, 20)]
        files = [await each.upload(f"The pump needs oil {number}.") for number in range(len(wanted))]
        new = [NewStoreFile(file.id, chunking=chunking) for file, chunking in zip(files, wanted, strict=True)]
        each.documents.stores.add(store.id, new, tenant="", batch=True)
        await each.until_through(store.id)
        cut = [each.documents.stores.get_file(store.id, file.id, tenant="").chunking for file in files]
        assert cut == [Chunking(160, 20), Chunking(160, 80), Chunking(120, 20)]


async def test_keyword_search_sees_a_file_before_its_vectors_are_there(tmp_path: Path) -> None:
    embedder = CountingEmbedder(gate=asyncio.Event())
    async with box(tmp_path, embedder=embedder) as each:
        store = each.documents.stores.create(tenant="")
        file = await each.upload("The pump needs oil.")
        await each.add(store.id, file.id)
        await each.until(lambda: bool(each.keyword_hits("pump")))
        await each.until(lambda: each.documents.stores.get_file(store.id, file.id, tenant="").chunks == 1)
        found = each.documents.stores.get_file(store.id, file.id, tenant="")
        assert (found.status, found.embedded) == ("in_progress", 0)
        assert embedder.gate is not None
        embedder.gate.set()
        await each.until_through(store.id)


async def test_the_same_text_is_embedded_once_for_all_files_and_stores_of_a_tenant(tmp_path: Path) -> None:
    text = "\n\n".join(f"Step {number} of the procedure." for number in range(100))
    async with box(tmp_path) as each:
        stores = [each.documents.stores.create(tenant="") for _ in range(2)]
        files = [await each.upload(text) for _ in range(2)]
        for store in stores:
            await each.add(store.id, *(file.id for file in files))
            await each.until_through(store.id)
        asked = each.embedder.texts
        assert set(asked.values()) <= {1, 2}
        assert asked.total() <= 101, "but for the one by which a new store learns its model's full name"
        assert each.rows("SELECT count(*) FROM vectors") == [(100,)]
        assert each.rows("SELECT count(*) FROM chunks WHERE vector IS NOT NULL") == [(400,)]


async def test_a_damaged_file_fails_alone_with_its_code(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        bad, good = await each.upload("BAD"), await each.upload("good text")
        await each.add(store.id, bad.id, good.id)
        await each.until_through(store.id)
        failed = each.documents.stores.get_file(store.id, bad.id, tenant="")
        assert (failed.status, failed.error_code) == ("failed", "invalid_file")
        assert each.documents.stores.get_file(store.id, good.id, tenant="").status == "completed"


async def test_a_text_that_cannot_be_embedded_fails_its_file_and_no_other(tmp_path: Path) -> None:
    async with box(tmp_path, embedder=CountingEmbedder(poison="poison")) as each:
        store = each.documents.stores.create(tenant="")
        files = [await each.upload(text) for text in ("fine one", "fine two\n\npoison", "fine three")]
        await each.add(store.id, *(file.id for file in files))
        await each.until_through(store.id)
        found = [each.documents.stores.get_file(store.id, file.id, tenant="") for file in files]
        assert [file.status for file in found] == ["completed", "failed", "completed"]
        assert found[1].error_code == "server_error"
        assert each.keyword_hits("fine") == ["fine one", "fine three", "fine two"]


async def test_a_busy_embedder_is_asked_again_after_what_it_says(tmp_path: Path) -> None:
    errors = [OverloadedError("busy", retry_after_s=0.01), UnavailableError("loading", retry_after_s=0.01)]
    async with box(tmp_path, embedder=CountingEmbedder(errors=list(errors))) as each:
        store = each.documents.stores.create(tenant="")
        file = await each.upload("The pump needs oil.")
        await each.add(store.id, file.id)
        await each.until_through(store.id)
        assert each.embedder.errors == []
        assert each.documents.stores.get_file(store.id, file.id, tenant="").embedded == 1


@pytest.mark.parametrize("tries", [MOST_ATTEMPTS - 1, MOST_ATTEMPTS])
async def test_files_fail_with_the_reason_when_the_parser_has_not_started_for_so_many_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    monkeypatch.setattr(documents, "BACK_OFF_S", (0.01, 0.01))
    async with box(tmp_path) as each:
        each.parser.errors = [ParserDownError("It cannot be started: no memory.") for _ in range(tries)]
        store = each.documents.stores.create(tenant="")
        files = [await each.upload(f"pump {number}") for number in range(2)]
        await each.add(store.id, *(file.id for file in files))
        await each.until_through(store.id)
        found = [each.documents.stores.get_file(store.id, file.id, tenant="") for file in files]
        if tries < MOST_ATTEMPTS:
            assert [file.status for file in found] == ["completed"] * 2
        else:
            assert [(file.status, file.error_code) for file in found] == [("failed", "server_error")] * 2
            assert all("no memory" in file.error for file in found)
        assert each.parser.errors == []
        await each.add(store.id, (await each.upload("valve")).id)
        await each.until_through(store.id)
        assert each.keyword_hits("valve") == ["valve"], "it goes on"


async def test_without_an_embedder_files_are_searchable_by_keyword(tmp_path: Path) -> None:
    async with box(tmp_path, embedder=CountingEmbedder(errors=[NotFoundError("no such model")])) as each:
        store = each.documents.stores.create(tenant="")
        file = await each.upload("The pump needs oil.")
        await each.add(store.id, file.id)
        await each.until_through(store.id)
        found = each.documents.stores.get_file(store.id, file.id, tenant="")
        assert (found.status, found.chunks, found.embedded) == ("completed", 1, 0)
        await each.documents.stores.reembed(store.id, tenant="")
        await each.until(lambda: each.documents.stores.get_file(store.id, file.id, tenant="").embedded == 1)


async def test_another_embedder_is_refused_until_the_store_is_embedded_again(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        file = await each.upload("The pump needs oil.")
        await each.add(store.id, file.id)
        await each.until_through(store.id)
    other = CountingEmbedder(model="other:1", dimensions=16)
    async with box(tmp_path, embedder=other, embedding_model="other") as each:
        new = await each.upload("Valve B7 opens at 4 bar.")
        with pytest.raises(ConflictError, match="embedder:1") as refused:
            await each.add(store.id, new.id)
        assert refused.value.code == "embedder_changed"
        assert each.rows("SELECT count(*) FROM store_files") == [(1,)]
        await each.documents.stores.reembed(store.id, tenant="")
        await each.until_reembedded(store.id)
        await each.add(store.id, new.id)
        await each.until_through(store.id)
        assert each.documents.stores.get(store.id, tenant="").model == "other:1"
        assert each.rows("SELECT DISTINCT length(vector), model FROM vectors") == [(64, "other:1")]


async def test_an_embedder_that_changes_its_dimension_under_the_same_name_fails_the_file(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        await each.add(store.id, (await each.upload("first")).id)
        await each.until_through(store.id)
        each.embedder.dimensions = 16
        file = await each.upload("second")
        await each.add(store.id, file.id)
        await each.until_through(store.id)
        failed = each.documents.stores.get_file(store.id, file.id, tenant="")
        assert (failed.status, failed.error_code) == ("failed", "server_error")
        assert "16" in failed.error
        assert "Embed the store again" in failed.error


async def test_adding_a_file_again_changes_nothing_unless_it_is_to_be_cut_otherwise(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        file = await each.upload("The pump needs oil.")
        await each.add(store.id, file.id)
        await each.until_through(store.id)
        await each.add(store.id, file.id)
        assert each.documents.stores.get_file(store.id, file.id, tenant="").status == "completed"
        new = [NewStoreFile(file.id, {"part": "B"}, Chunking(100, 10))]
        await asyncio.to_thread(each.documents.stores.add, store.id, new, tenant="", batch=False)
        await each.until_through(store.id)
        await each.until(lambda: each.rows("SELECT count(*) FROM erasures") == [(0,)])
        assert each.parser.parsed == ["a.txt", "a.txt"]
        assert each.keyword_hits("pump") == ["The pump needs oil."]
        found = each.documents.stores.get_file(store.id, file.id, tenant="")
        assert (found.chunking, found.attributes) == (Chunking(100, 10), {"part": "B"})


async def test_a_cancelled_batch_is_not_gone_on_with_and_keeps_what_is_searchable(tmp_path: Path) -> None:
    embedder = CountingEmbedder(gate=asyncio.Event())
    async with box(tmp_path, embedder=embedder) as each:
        store = each.documents.stores.create(tenant="")
        new = [NewStoreFile((await each.upload(f"pump {number}")).id) for number in range(3)]
        batch, _ = await asyncio.to_thread(each.documents.stores.add, store.id, new, tenant="", batch=True)
        await each.until(lambda: len(each.keyword_hits("pump")) == 3)
        cancelled = await asyncio.to_thread(each.documents.stores.cancel_batch, store.id, batch, tenant="")
        assert (cancelled.status, cancelled.counts.cancelled) == ("cancelled", 3)
        assert embedder.gate is not None
        embedder.gate.set()
        await each.add(store.id, (await each.upload("valve")).id)
        await each.until_through(store.id)
        assert each.rows("SELECT sum(embedded) FROM store_files WHERE batch <> ''") == [(0,)]
        assert len(each.keyword_hits("pump")) == 3


async def test_two_stores_are_deleted_while_files_are_taken_in(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        stores = [each.documents.stores.create(tenant="") for _ in range(3)]
        files = [await each.upload("\n\n".join(f"pump {file} {number}" for number in range(40))) for file in range(20)]
        for store in stores:
            await each.add(store.id, *(file.id for file in files))
        await each.until(lambda: each.rows("SELECT count(*) FROM chunks")[0][0] > 100)  # type: ignore[operator]
        await asyncio.gather(*(each.documents.stores.delete(store.id, tenant="") for store in stores[:2]))
        for key in (1, 2):
            assert each.keywords.search(key, "pump", 10) == []
            assert each.rows("SELECT count(*) FROM chunks WHERE store = ?", key) == [(0,)]
        await each.until_through(stores[2].id)
        assert len(each.keyword_hits("pump", 3)) == 800
        assert each.keywords.chunk_ids(1).tolist() == each.keywords.chunk_ids(2).tolist() == []
        assert sorted(each.vectors.stores) == [3]
        assert each.rows("SELECT count(*) FROM vectors") == [(800,)]


async def test_an_orderly_end_gives_back_what_was_begun_and_does_not_count_it(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        each.parser.gate = asyncio.Event()
        await each.add(store.id, (await each.upload("The pump needs oil.")).id)
        await each.until(lambda: each.rows("SELECT attempts FROM store_files") == [(1,)])
    async with box(tmp_path, running=False) as each:
        assert each.rows("SELECT attempts, lease_owner FROM store_files") == [(0, "")]
    async with box(tmp_path) as each:
        await each.until_through(store.id)
        assert each.keyword_hits("pump") == ["The pump needs oil."]


async def test_the_claims_of_a_dead_worker_are_taken_over_at_the_start(tmp_path: Path) -> None:
    async with box(tmp_path, running=False) as each:
        store = each.documents.stores.create(tenant="")
        await each.add(store.id, (await each.upload("The pump needs oil.")).id)
        for table in ("store_files", "stores"):
            sql = f"UPDATE {table} SET lease_owner = 'dead', lease_until = unixepoch() + 3600"
            await each.database.write(lambda write, sql=sql: write.execute(sql).fetchall())  # type: ignore[misc]
    async with box(tmp_path, lease_s=3600) as each:
        await each.until_through(store.id)
        assert each.rows("SELECT embedded, attempts FROM store_files") == [(1, 0)]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\n", "a\x7f", "a\0", "\ud800", "", "k" * 65])
async def test_an_attribute_that_no_filter_could_name_is_refused_and_nothing_changes(tmp_path: Path, name: str) -> None:
    async with box(tmp_path, running=False) as each:
        store, file = each.documents.stores.create(tenant=""), await each.upload("The pump needs oil.")
        new = [NewStoreFile(file.id, {name: 1})]
        with pytest.raises(InvalidRequestError) as refused:
            each.documents.stores.add(store.id, new, tenant="", batch=False)
        assert refused.value.param == "attributes"
        await each.add(store.id, file.id)
        with pytest.raises(InvalidRequestError):
            each.documents.stores.change_file(store.id, file.id, {name: 1}, tenant="")
        assert each.rows("SELECT attributes FROM store_files") == [("{}",)]


@pytest.mark.parametrize("value", ["a\0b", "\udc00"])
async def test_an_attribute_that_no_filter_could_equal_is_refused(tmp_path: Path, value: str) -> None:
    async with box(tmp_path, running=False) as each:
        store, file = each.documents.stores.create(tenant=""), await each.upload("The pump needs oil.")
        with pytest.raises(InvalidRequestError, match="surrogate"):
            each.documents.stores.add(store.id, [NewStoreFile(file.id, {"a": value})], tenant="", batch=False)
        assert each.rows("SELECT count(*) FROM store_files") == [(0,)]
