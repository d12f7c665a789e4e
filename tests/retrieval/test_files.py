"""Uploads: whole or not at all, within limits, each tenant's own."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.core.errors import InvalidRequestError, NotFoundError, StorageError, TooLargeError
from appliance.retrieval import disk
from tests.retrieval.boxes import box, once

pytestmark = pytest.mark.anyio


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.glob("files/*"))


async def test_a_file_comes_back_as_it_came(tmp_path: Path) -> None:
    content = os.urandom(3 * 2**20 + 17)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 65_537):
            yield content[start : start + 65_537]

    async with box(tmp_path, running=False, most_bytes=2**23) as each:
        files = each.documents.files
        stored = await files.create("a.bin", "user_data", pieces(), tenant="")
        assert stored.size == len(content)
        assert files.get(stored.id, tenant="") == stored
        assert b"".join([piece async for piece in files.content(stored.id, tenant="")]) == content
        assert (tmp_path / "files" / stored.id).stat().st_mode & 0o777 == 0o600


async def test_nothing_is_left_of_a_file_that_is_too_large_empty_or_cut_off(tmp_path: Path) -> None:
    async def cut_off() -> AsyncIterator[bytes]:
        yield b"start"
        raise ConnectionResetError

    async with box(tmp_path, running=False, most_bytes=1000) as each:
        files = each.documents.files
        with pytest.raises(TooLargeError, match="1000"):
            await files.create("a.txt", "assistants", once(b"x" * 1001), tenant="")
        with pytest.raises(InvalidRequestError, match="empty"):
            await files.create("a.txt", "assistants", once(b""), tenant="")
        with pytest.raises(InvalidRequestError, match="name"):
            await files.create("a\0.txt", "assistants", once(b"x"), tenant="")
        with pytest.raises(ConnectionResetError):
            await files.create("a.txt", "assistants", cut_off(), tenant="")
        assert names(tmp_path) == []
        assert files.list(tenant="") == ([], False)


async def test_a_tenant_sees_its_own_files_only(tmp_path: Path) -> None:
    async with box(tmp_path, running=False) as each:
        files = each.documents.files
        mine = await each.upload("mine", tenant="one")
        for call in (files.get, lambda file, tenant: files.list(tenant=tenant, after=file)):
            with pytest.raises(NotFoundError):
                call(mine.id, tenant="two")
        with pytest.raises(NotFoundError):
            await files.delete(mine.id, tenant="two")
        with pytest.raises(NotFoundError):
            await anext(files.content(mine.id, tenant="two"))
        assert files.list(tenant="two") == ([], False)
        store = each.documents.stores.create(tenant="two")
        with pytest.raises(NotFoundError):
            await each.add(store.id, mine.id, tenant="two")
        assert names(tmp_path) == [mine.id]


async def test_pages_follow_each_other_in_both_orders(tmp_path: Path) -> None:
    async with box(tmp_path, running=False) as each:
        files = each.documents.files
        made = [(await each.upload(f"{number}", filename=f"{number}.txt")).id for number in range(5)]
        first, more = files.list(tenant="", limit=2)
        assert ([one.id for one in first], more) == ([made[4], made[3]], True)
        last, more = files.list(tenant="", limit=3, after=made[3])
        assert ([one.id for one in last], more) == ([made[2], made[1], made[0]], False)
        oldest, more = files.list(tenant="", limit=4, after=made[0], newest_first=False)
        assert ([one.id for one in oldest], more) == (made[1:], False)
        assert files.list(tenant="", purpose="other") == ([], False)


async def test_a_disk_without_room_is_told_with_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SPARE_BYTES", 2 * shutil.disk_usage(tmp_path).total)
    async with box(tmp_path, running=False) as each:
        with pytest.raises(StorageError, match="MB are free") as refused:
            await each.upload("text")
        assert refused.value.code == "disk_full"
        assert names(tmp_path) == []


async def test_what_a_crashed_upload_left_goes_after_an_hour(tmp_path: Path) -> None:
    async with box(tmp_path, running=False) as each:
        kept = await each.upload("kept")
        fresh, stale, orphan = (tmp_path / "files" / name for name in (".file-a.part", ".file-b.part", "file-c"))
        for path in (fresh, stale, orphan):
            path.write_text("part")
        for path in (stale, orphan, tmp_path / "files" / kept.id):
            os.utime(path, (1, 1))
        each.documents.files.remove_garbage()
        assert names(tmp_path) == sorted([fresh.name, kept.id])


FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from appliance.core.errors import StorageError
from tests.retrieval.boxes import box

async def main(folder):
    async with box(folder, most_bytes=2**30) as each:
        store = each.documents.stores.create(tenant="")
        first = await each.upload("kept text")
        await each.add(store.id, first.id)
        await each.until_through(store.id)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        full = (1_000_000, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, full)
        try:
            await each.upload("x" * 1_500_000)
        except StorageError as error:
            print(error.code)
        pages = [(await each.upload("\\n\\n".join(f"page {n} {k} " * 100 for k in range(200)))).id for n in range(4)]
        try:
            await each.add(store.id, *pages)
            await each.until(lambda: len(each.parser.parsed) > 4)
        except StorageError as error:
            print("refused")
        print(each.keyword_hits("kept"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await each.until_through(store.id)
        print(each.documents.stores.get(store.id, tenant="").counts.completed)
        print(len(each.keyword_hits("page")), each.rows("SELECT count(*) FROM chunks")[0][0])

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_full_disk_fails_the_upload_and_delays_the_rest_until_there_is_room(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    result = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["disk_full", "['kept text']", "5", "800 801"], result.stderr
