"""Whenever the process is killed, taking in, deleting and embedding anew end as if it had not been.

The child kills itself before or after its n-th commit, or before or after its n-th change of an index, for each n there
is. What it leaves is gone on with by another process.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.retrieval.boxes import Box, CountingEmbedder, box, files_with

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]

MARKER = "xylophonesecret"

CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from appliance.retrieval import embedding
from appliance.retrieval.schema import MIGRATIONS
from appliance.store.database import Database
from tests.retrieval.boxes import CountingEmbedder, box

folder, action, where, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
embedding.BATCH = 4
passed = {"commit": 0, "index": 0}
armed = False

def pass_by(kind):
    global passed
    if armed and kind == where.split()[1]:
        passed[kind] += 1
        if passed[kind] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

def watched(function, kind):
    def run(*values):
        if where.startswith("before"):
            pass_by(kind)
        result = function(*values)
        if where.startswith("after"):
            pass_by(kind)
        return result
    return run

class Watched(Database):
    def submit(self, function):
        future = super().submit(watched(function, "commit") if where.startswith("before") else function)
        if where.startswith("after"):
            future.result()
            pass_by("commit")
        return future

def opened(path):
    return Watched(path, migrations=MIGRATIONS, overwrite_deleted=True)

async def main():
    global armed
    model, dimensions = ("other:1", 16) if action == "embed with another" else ("embedder:1", 8)
    embedder = CountingEmbedder(log=folder.parent / "asked", model=model, dimensions=dimensions)
    async with box(folder, database=opened, embedder=embedder, embedding_model=embedder.model) as each:
        words, meanings = ("add", "remove", "erase"), ("add", "remove", "drop", "rebuild")
        for part, names in ((each.keywords, words), (each.vectors, meanings)):
            for name in names:
                setattr(part, name, watched(getattr(part, name), "index"))
        stores = each.documents.stores
        store = stores.list(tenant="", limit=1, after="", newest_first=True)[0][0].id
        names = {each.filename: each.id for each in each.documents.files.list(tenant="")[0]}
        armed = True
        if action == "take in":
            await each.add(store, *names.values())
            await each.until_through(store)
        elif action == "delete file":
            await each.documents.files.delete(names["marked"], tenant="")
        elif action == "delete store":
            await stores.delete(store, tenant="")
        elif action in ("embed again", "embed with another"):
            await each.documents.stores.reembed(store, tenant="")
            await each.until_reembedded(store)
            async with each.documents._turns.vectors:  # the index is made anew behind the last commit
                pass
        armed = False

asyncio.run(main())
"""

TEXTS = {
    "marked": "\n\n".join(f"{MARKER} passage {number}" for number in range(6)),
    "shared": f"ordinary text\n\n{'common passage'}",
    "third": "common passage\n\nthird text",
    "bad": "BAD",
}


async def prepare(folder: Path, *, taken_in: bool) -> None:
    async with box(folder, running=taken_in) as each:
        store = each.documents.stores.create(tenant="")
        files = [(await each.upload(text, filename=name)).id for name, text in TEXTS.items()]
        if taken_in:
            await each.add(store.id, *files)
            await each.until_through(store.id)


def killed(folder: Path, action: str, where: str, moment: int) -> bool:
    """Run the child; return whether it came to be killed."""
    command = [sys.executable, "-c", CHILD, str(folder), action, where, str(moment)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode != 0


async def each_kill(tmp_path: Path, action: str, where: str, *, taken_in: bool) -> list[Path]:
    """Return a folder for each moment at which a child was killed."""
    template = tmp_path / "template"
    await prepare(template, taken_in=taken_in)
    found: list[Path] = []
    while True:
        folder = tmp_path / str(len(found) + 1) / "data"
        shutil.copytree(template, folder)
        if not await asyncio.to_thread(killed, folder, action, where, len(found) + 1):
            assert len(found) >= 2, f"only {len(found)} moments of {action!r} were seen"
            return found
        found.append(folder)


async def until_known(each: Box, ids: list[object]) -> None:
    """Wait until the keyword index has just these chunks: it is brought up to date beside the first searches."""
    await each.until(lambda: each.keywords.chunk_ids().tolist() == ids)


async def check_whole(each: Box, count: int) -> None:
    """Assert that every text is there once, in truth and indexes alike."""
    texts = Counter(text for (text,) in each.rows("SELECT text FROM chunks"))
    wanted = Counter(part for text in TEXTS.values() if text != "BAD" for part in text.split("\n\n"))
    assert texts == wanted
    ids = [chunk for (chunk,) in each.rows("SELECT id FROM chunks ORDER BY id")]
    await until_known(each, ids)
    assert each.rows("SELECT count(*) FROM chunks WHERE vector IS NULL") == [(0,)]
    assert each.rows("SELECT count(*) FROM vectors") == [(len(wanted),)]
    assert len(each.keyword_hits(MARKER)) == 6
    assert each.rows("SELECT status, count(*) FROM store_files GROUP BY status") == [("completed", 3), ("failed", 1)]
    assert each.rows("SELECT sum(embedded), sum(chunks) FROM store_files") == [(count, count)]


@pytest.mark.parametrize("where", ["before commit", "after commit", "before index", "after index"])
async def test_taking_in_is_gone_on_with(tmp_path: Path, where: str) -> None:
    for folder in await each_kill(tmp_path, "take in", where, taken_in=False):
        embedder = CountingEmbedder(log=folder.parent / "asked")
        async with box(folder, embedder=embedder) as each:
            [store] = each.documents.stores.list(tenant="", limit=1, after="", newest_first=True)[0]
            files = [file.id for file in each.documents.files.list(tenant="")[0]]
            if store.counts.in_progress + store.counts.completed == 0:
                await each.add(store.id, *files)  # it died before they were acknowledged
            await each.until_through(store.id)
            await check_whole(each, 10)
        asked = Counter((folder.parent / "asked").read_text(encoding="utf-8").splitlines())
        again = sum(asked.values()) - len(asked)
        assert again <= 4 + 1, f"{again} texts were embedded twice, more than the batch in hand"


@pytest.mark.parametrize("where", ["before commit", "after commit", "before index", "after index"])
async def test_embedding_again_is_gone_on_with(tmp_path: Path, where: str) -> None:
    for folder in await each_kill(tmp_path, "embed again", where, taken_in=True):
        async with box(folder) as each:
            [store] = each.documents.stores.list(tenant="", limit=1, after="", newest_first=True)[0]
            await each.until_reembedded(store.id)
            await check_whole(each, 10)


@pytest.mark.parametrize("where", ["before commit", "after commit", "before index", "after index"])
async def test_embedding_with_another_model_is_gone_on_with(tmp_path: Path, where: str) -> None:
    """Whatever the moment, a store has the vectors of one model, and what was embedded is not embedded again."""
    for folder in await each_kill(tmp_path, "embed with another", where, taken_in=True):
        embedder = CountingEmbedder(log=folder.parent / "asked", model="other:1", dimensions=16)
        async with box(folder, embedder=embedder, embedding_model="other:1", running=False) as each:
            [store] = each.documents.stores.list(tenant="", limit=1, after="", newest_first=True)[0]
            model = each.documents.stores.get(store.id, tenant="").model
            used = "SELECT DISTINCT v.model, length(v.vector) FROM chunks c JOIN vectors v ON v.id = c.vector"
            assert each.rows(used) == [(model, 64 if model == "other:1" else 32)]
        async with box(folder, embedder=embedder, embedding_model="other:1") as each:
            await each.documents.stores.reembed(store.id, tenant="")  # it may have died before it was acknowledged
            await each.until_reembedded(store.id)
            await check_whole(each, 10)
            assert each.rows("SELECT DISTINCT model, length(vector) FROM vectors") == [("other:1", 64)]
            assert each.rows("SELECT count(*) FROM chunks WHERE next_vector IS NOT NULL") == [(0,)]


@pytest.mark.parametrize("action", ["delete file", "delete store"])
@pytest.mark.parametrize("where", ["before commit", "after commit", "before index", "after index"])
async def test_a_deletion_is_gone_on_with_and_leaves_nothing(tmp_path: Path, where: str, action: str) -> None:
    for folder in await each_kill(tmp_path, action, where, taken_in=True):
        async with box(folder) as each:
            await each.until(lambda: each.rows("SELECT count(*) FROM erasures") == [(0,)])
            begun = each.rows("SELECT count(*) FROM store_files")[0][0] != 4
            if not begun:  # it died before the first commit: nothing may have changed
                await check_whole(each, 10)
                continue
            assert each.rows("SELECT count(*) FROM chunks") == [(4 if action == "delete file" else 0,)]
            assert each.rows("SELECT count(*) FROM vectors") == [(3 if action == "delete file" else 0,)]
            ids = [chunk for (chunk,) in each.rows("SELECT id FROM chunks ORDER BY id")]
            await until_known(each, ids)
            left = [path.parent.name for path in files_with(folder, MARKER.encode())]
            assert left == ([] if action == "delete file" else ["files"])
