"""Kills, flipped bits, missing files and a full disk: searches afterwards are those of a fresh index."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from appliance.core.errors import StorageError
from appliance.retrieval.vectors import VectorIndexes, build
from appliance.retrieval.vectors import folder as folder_module
from tests.retrieval.test_vectors import Box
from tests.retrieval.truths import Floats, Ids, clustered

CHILD_DEADLINE_S = 60

KILLED_AT_EACH_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from appliance.retrieval.vectors import folder, native
from tests.retrieval.test_vectors import QUERIES, Box

native.faiss()
prepared, work, action = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def killed_at(step):
    count = 0
    def stepping(function):
        def wrapped(*arguments, **named):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)
        return wrapped
    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, stepping(getattr(os, name)))
    write_index = folder.write_index
    folder.write_index = lambda built, model, write: write_index(built, model, stepping(write))

for step in range(1, 200):
    box_folder = work / str(step)
    shutil.copytree(prepared, box_folder)
    child = os.fork()
    if child == 0:
        box = Box(box_folder)
        killed_at(step)
        if action == "open":
            box.indexes.search(1, QUERIES, 10)
        else:
            getattr(box.indexes, action)(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(step, os.waitstatus_to_exitcode(status), flush=True)
    if status == 0:
        break
"""


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder with a generation that has 60 removed chunks in it, and 150 missing."""
    box = Box(tmp_path / "prepared")
    ids = box.add(1, 500)
    box.truth.take(ids[::9])
    box.truth.put(1, np.arange(1001, 1151, dtype=np.int64), clustered(150, seed=8))
    box.indexes.close()
    box.truth.close()
    return tmp_path / "prepared"


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    made.add(1, 500)
    yield made
    made.indexes.close()
    made.truth.close()


@pytest.mark.parametrize("action", ["compact", "rebuild", "erase", "drop"])
def test_a_kill_at_any_step_leaves_what_a_fresh_index_finds(prepared: Path, tmp_path: Path, action: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    program = [sys.executable, "-c", KILLED_AT_EACH_STEP, str(prepared), str(work), action]
    done = subprocess.run(program, capture_output=True, text=True, timeout=CHILD_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    endings = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert endings[-1] == 0
    assert set(endings[:-1]) == {-signal.SIGKILL}
    assert len(endings) >= (4 if action == "drop" else 10), "else steps are missing"

    for step in range(1, len(endings) + 1):
        box = Box(work / str(step))
        box.assert_exact(1)
        assert box.indexes.verify(1) == [], step
        assert box.files(1) in ([".json", ".vectors"], []), "no leftovers"
        after_a_restart = box.indexes.search(1, clustered(5), 10)
        box.indexes.rebuild(1)
        assert after_a_restart == box.indexes.search(1, clustered(5), 10)
        box.indexes.close()
        box.truth.close()


def test_a_kill_while_an_index_is_made_for_the_first_time_leaves_a_store_that_works(tmp_path: Path) -> None:
    box = Box(tmp_path / "prepared")
    box.truth.put(1, np.arange(1, 400, dtype=np.int64), clustered(399))
    box.indexes.close()
    box.truth.close()
    (tmp_path / "work").mkdir()
    program = [sys.executable, "-c", KILLED_AT_EACH_STEP, str(tmp_path / "prepared"), str(tmp_path / "work"), "open"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=CHILD_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    for each in (tmp_path / "work").iterdir():
        box = Box(each)
        box.assert_exact(1)
        assert box.files(1) == [".json", ".vectors"]
        box.indexes.close()
        box.truth.close()


@pytest.mark.parametrize("name", ["manifest.json", "*.vectors"])
@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_a_flipped_bit_is_noticed_and_the_index_made_anew(
    box: Box, name: str, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    box.indexes.close()
    (path,) = (box.folder / "vectors" / "1").glob(name)
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    box.reopen()
    assert len(box.indexes.verify(1)) == 1
    with caplog.at_level(logging.WARNING):
        box.assert_exact(1)
    assert "is made anew from the database" in caplog.text
    assert box.indexes.verify(1) == []


@pytest.mark.parametrize("name", ["manifest.json", "*.vectors"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "folder"])
def test_a_file_that_is_not_whole_is_made_anew(box: Box, name: str, how: str) -> None:
    box.indexes.close()
    (path,) = (box.folder / "vectors" / "1").glob(name)
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(content[: len(content) // 2] if how == "short" else b"")
    box.reopen()
    box.assert_exact(1)
    assert box.indexes.verify(1) == []


def test_a_manifest_of_another_version_is_made_anew(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_FORMAT", 2)
    box.reopen()
    assert box.indexes.verify(1) == ["manifest.json is of format 1, not 2."]
    box.assert_exact(1)
    assert box.indexes.verify(1) == []


def test_leftovers_are_deleted_when_a_store_is_opened(box: Box) -> None:
    folder = box.folder / "vectors" / "1"
    (folder / "0123.partial").write_bytes(b"half")
    (folder / "4567.vectors").write_bytes(b"whole, but never flipped to")
    box.reopen()
    box.assert_exact(1)
    assert box.files(1) == [".json", ".vectors"]


def test_the_whole_folder_can_be_deleted(box: Box) -> None:
    box.indexes.close()
    shutil.rmtree(box.folder / "vectors")
    box.reopen()
    box.assert_exact(1)
    assert box.indexes.verify(1) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 5000, 9000])
def test_a_full_disk_leaves_the_index_as_it_was(box: Box, size: int) -> None:
    box.add(1, 50)
    before = sorted(path.name for path in (box.folder / "vectors" / "1").iterdir())
    with largest_file(size), pytest.raises(StorageError) as caught:
        box.indexes.compact(1)
    assert caught.value.code == "disk_full"
    assert sorted(path.name for path in (box.folder / "vectors" / "1").iterdir()) == before
    box.assert_exact(1)
    box.indexes.compact(1)
    assert box.indexes.verify(1) == []


def test_a_disk_without_room_is_told_before_anything_is_written(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "SPARE_BYTES", 2**60)
    with pytest.raises(StorageError, match=r"bytes are needed and 1,152,921,504,606,846,976 in reserve") as caught:
        box.indexes.rebuild(1)
    assert caught.value.code == "disk_full"
    box.assert_exact(1)


def test_what_is_added_to_a_full_disk_is_found(
    box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder_module, "SPARE_BYTES", 2**60)
    with caplog.at_level(logging.WARNING):
        box.add(1, 150)
    assert "not compacted, but complete in memory" in caplog.text
    box.assert_exact(1)
    monkeypatch.undo()
    box.add(1, 1)
    generation = box.generation(1)
    assert generation is not None
    assert generation.facts.count == 651


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be opened"):
        VectorIndexes(tmp_path / "file" / "vectors", None, memory_bytes=1)  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(box: Box) -> None:
    folder = box.folder / "vectors" / "1"
    folder.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="belongs to this user"):
            box.indexes.rebuild(1)
    finally:
        folder.chmod(0o700)
    box.assert_exact(1)


def test_an_index_that_runs_out_of_memory_is_told_and_the_old_one_holds(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(build, "train", train)
    with pytest.raises(StorageError, match="500 vectors could not be made: std::bad_alloc"):
        box.indexes.rebuild(1)
    box.assert_exact(1)
    monkeypatch.setattr(build, "merge_flat", train)
    with pytest.raises(StorageError, match="could not be made"):
        box.indexes.compact(1)
    box.assert_exact(1)


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("action", ["rebuild", "compact"])
def test_chunks_may_go_while_an_index_is_made_of_them(
    box: Box, monkeypatch: pytest.MonkeyPatch, share: int, action: str
) -> None:
    box.add(1, 60)
    ids, fetch = box.truth.ids(1), box.truth.fetch

    def remove_and_fetch(store: int, wanted: Ids) -> tuple[Ids, Floats]:
        box.truth.take(ids[::share])
        return fetch(store, wanted)

    monkeypatch.setattr(box.truth, "fetch", remove_and_fetch)
    getattr(box.indexes, action)(1)
    monkeypatch.undo()
    box.assert_exact(1)
    assert box.indexes.verify(1) == []
    box.indexes.erase(1)
    assert box.indexes.verify(1) == []
