"""What is deleted is in no search from then on, and in no file once the deletion returns."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from appliance.core.errors import NotFoundError, StorageError
from appliance.core.retrieval import StoreChange
from appliance.retrieval.schema import MIGRATIONS
from appliance.store.database import Database
from tests.retrieval.boxes import Box, box, files_with

pytestmark = pytest.mark.anyio

MARKER = "xylophonesecret"


def left(folder: Path, marker: str = MARKER) -> list[str]:
    return [str(path.relative_to(folder)) for path in files_with(folder, marker.encode())]


async def filled(each: Box, marker: str, neighbours: int = 30) -> tuple[str, str]:
    """Take in a marked file among others, and return the store and the file."""
    store = each.documents.stores.create(tenant="")
    marked = "\n\n".join(f"{marker} passage {number} " * 20 for number in range(60))
    texts = [f"ordinary {number} " * 50 for number in range(neighbours)]
    texts.insert(neighbours // 2, marked)
    files = [await each.upload(text, filename=f"{text[:10]}.txt") for text in texts]
    await each.add(store.id, *(file.id for file in files))
    await each.until_through(store.id)
    return store.id, files[neighbours // 2].id


async def test_no_byte_of_a_deleted_file_is_left_in_the_folder(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store, file = await filled(each, MARKER)
        assert left(tmp_path), "the scan finds what is there"
        assert each.keyword_hits(MARKER)
        await each.documents.files.delete(file, tenant="")
        assert left(tmp_path, MARKER[:10]) == [], "its name is gone too"
        assert each.keyword_hits(MARKER) == []
        assert len(each.keyword_hits("ordinary")) == 30
        assert each.rows("SELECT count(*) FROM vectors") == [(30,)]
        with pytest.raises(NotFoundError):
            each.documents.stores.get_file(store, file, tenant="")
    assert left(tmp_path) == []


async def test_no_byte_of_a_deleted_store_is_left_and_its_files_stay(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store, file = await filled(each, MARKER)
        await each.documents.stores.delete(store, tenant="")
        assert left(tmp_path) == [f"files/{file}"]
        assert each.vectors.stores == {}
        content = b"".join([piece async for piece in each.documents.files.content(file, tenant="")])
        assert content.startswith(MARKER.encode())


async def test_a_file_removed_from_a_store_is_left_as_uploaded_only(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store, file = await filled(each, MARKER)
        await each.documents.stores.remove_file(store, file, tenant="")
        assert left(tmp_path) == [f"files/{file}"]


async def test_it_erases_without_its_loop_as_well(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        _, file = await filled(each, MARKER)
    async with box(tmp_path, running=False) as each:
        await each.documents.files.delete(file, tenant="")
        assert left(tmp_path) == []


async def test_texts_that_moved_between_pages_leave_nothing_behind(tmp_path: Path) -> None:
    """Pages of the database split and merge as files of every size come and go in any order."""
    choose = random.Random(1)
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        kept: dict[str, str] = {}
        for number in range(60):
            marker = f"marker{number:03d}zz"
            sizes = [choose.choice((1, 5, 30, 120, 400)) for _ in range(choose.choice((1, 1, 2, 30)))]
            file = await each.upload("\n\n".join(f"{marker} " * size + str(place) for place, size in enumerate(sizes)))
            kept[marker] = file.id
            await each.add(store.id, file.id)
            if number % 3 == 2:
                await each.until_through(store.id)
                gone = choose.choice(sorted(kept))
                await each.documents.files.delete(kept.pop(gone), tenant="")
                assert left(tmp_path, gone) == []
        await each.until_through(store.id)
        for marker in sorted(kept):
            await each.documents.files.delete(kept.pop(marker), tenant="")
        assert left(tmp_path, "marker") == []


async def test_deletions_that_come_together_are_all_done_when_they_return(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        files = [await each.upload(f"{MARKER} {number}") for number in range(40)]
        await each.add(store.id, *(file.id for file in files))
        await asyncio.gather(*(each.documents.files.delete(file.id, tenant="") for file in files))
        assert left(tmp_path) == []
        assert each.rows("SELECT count(*) FROM erasures") == [(0,)]
        assert each.documents.stores.get(store.id, tenant="").counts.in_progress == 0


async def test_a_deletion_that_fails_is_recorded_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with box(tmp_path) as each:
        _, file = await filled(each, MARKER)
    async with box(tmp_path, running=False) as each:

        def fail() -> None:
            raise StorageError("The disk is full.")

        with monkeypatch.context() as patch:
            patch.setattr(each.keywords, "erase", fail)
            with pytest.raises(StorageError):
                await each.documents.files.delete(file, tenant="")
        assert each.keyword_hits(MARKER) == [], "it is found no more all the same"
        assert each.rows("SELECT count(*) > 0 FROM erasures") == [(1,)]
    async with box(tmp_path) as each:
        await each.until(lambda: each.rows("SELECT count(*) FROM erasures") == [(0,)])
        assert left(tmp_path) == []


async def test_a_file_deleted_while_it_is_taken_in_leaves_nothing(tmp_path: Path) -> None:
    async with box(tmp_path) as each:
        store = each.documents.stores.create(tenant="")
        each.parser.gate = asyncio.Event()
        file = await each.upload(f"{MARKER} text")
        await each.add(store.id, file.id)
        await each.until(lambda: each.rows("SELECT count(*) FROM store_files WHERE lease_owner <> ''") == [(1,)])
        removal = asyncio.gather(each.documents.stores.remove_file(store.id, file.id, tenant=""))
        await removal
        each.parser.gate.set()
        await each.add(store.id, (await each.upload("other")).id)
        await each.until_through(store.id)
        assert left(tmp_path) == [f"files/{file.id}"]


class LateClock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now


async def test_what_is_past_its_time_is_not_seen_and_is_erased(tmp_path: Path) -> None:
    clock = LateClock()
    async with box(tmp_path, clock=clock) as each:  # type: ignore[arg-type]
        store = each.documents.stores.create(tenant="", expires_after_days=1)
        kept = each.documents.stores.create(tenant="")
        file = await each.documents.files.create(
            "a.txt", "assistants", _bytes(MARKER.encode()), tenant="", expires_after_s=3600
        )
        await each.add(store.id, file.id)
        await each.until_through(store.id)
        clock.now += 2 * 86_400
        with pytest.raises(NotFoundError):
            each.documents.files.get(file.id, tenant="")
        with pytest.raises(NotFoundError):
            each.documents.stores.get(store.id, tenant="")
        await each.documents._sweep()
        await each.until(lambda: each.rows("SELECT count(*) FROM erasures") == [(0,)])
        assert left(tmp_path) == []
        found, _ = each.documents.stores.list(tenant="", limit=10, after="", newest_first=True)
        assert [one.id for one in found] == [kept.id]


async def test_a_store_is_changed_and_zero_days_are_no_expiry(tmp_path: Path) -> None:
    async with box(tmp_path, running=False) as each:
        stores = each.documents.stores
        store = stores.create(tenant="", name="a", metadata={"k": "v"}, expires_after_days=3)
        assert store.expires == store.last_active + 3 * 86_400
        changed = stores.change(store.id, StoreChange(name="b", expires_after_days=0), tenant="")
        assert (changed.name, changed.metadata, changed.expires) == ("b", {"k": "v"}, None)
        with pytest.raises(NotFoundError):
            stores.change(store.id, StoreChange(name="c"), tenant="other")


async def _bytes(data: bytes):  # type: ignore[no-untyped-def]
    yield data


async def test_without_overwriting_the_scan_would_find_the_text(tmp_path: Path) -> None:
    """The proof's other half: it is the overwriting that leaves nothing, not luck."""

    def careless(path: Path) -> Database:
        database = Database(path, migrations=MIGRATIONS)
        database.write_blocking(lambda each: each.execute("PRAGMA secure_delete=OFF").fetchall())  # a build's default
        return database

    async with box(tmp_path, database=careless) as each:
        _, file = await filled(each, MARKER)
        await each.documents.files.delete(file, tenant="")
        assert left(tmp_path) == ["retrieval.db"]
