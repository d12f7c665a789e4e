from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.core import words
from appliance.core.errors import ConflictError, StorageError, UnavailableError
from appliance.retrieval import lexical
from appliance.retrieval.lexical import KeywordIndex
from appliance.retrieval.postings import term_hash

MARKER = "zyxomarker"
TEXTS = [
    "The pump XR-4500/b has a leaking seal.",
    "Replace the seal of the pump every 500 hours.",
    "水泵的密封圈漏水",
    "The boiler needs a new valve.",
]
Results = list[tuple[int, float]]


def ids(results: Results) -> list[int]:
    return [chunk_id for chunk_id, _ in results]


def allowed(*chunk_ids: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(chunk_ids, np.int64)


def has_marker(folder: Path) -> bool:
    """Whether any file has the marker's text, or its term as the index writes it."""
    traces = (MARKER.encode(), term_hash(words.passage_terms(MARKER)[0]).to_bytes(8, "little"))
    return any(trace in path.read_bytes() for path in folder.iterdir() for trace in traces)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[KeywordIndex]:
    with closing(KeywordIndex(tmp_path / "keywords")) as made:
        made.add(1, list(enumerate(TEXTS, 1)))
        yield made


@pytest.fixture(params=["in memory", "in files"])
def either(index: KeywordIndex, request: pytest.FixtureRequest) -> KeywordIndex:
    if request.param == "in files":
        index.flush()
    return index


def test_what_was_added_is_found_at_once(either: KeywordIndex) -> None:
    assert ids(either.search(1, "pump seal", 10)) == [2, 1]
    assert ids(either.search(1, "xr4500b", 10)) == [1]
    assert ids(either.search(1, "密封", 10)) == [3]
    assert ids(either.search(1, "水", 10)) == [3]
    either.add(1, [(9, "A second boiler.")])
    assert sorted(ids(either.search(1, "boilers", 10))) == [4, 9]


def test_a_question_without_words_finds_nothing(either: KeywordIndex) -> None:
    for query in ("", " ", "?!", "😀", "\u202e", "unheard"):
        assert either.search(1, query, 10) == []


def test_a_store_has_its_own_passages(either: KeywordIndex) -> None:
    either.add(2, [(10, "Another pump.")])
    assert ids(either.search(2, "pump seal", 10)) == [10]
    assert ids(either.search(1, "another", 10)) == []
    assert either.search(3, "pump", 10) == []
    assert either.chunk_ids().tolist() == [1, 2, 3, 4, 10]
    assert either.chunk_ids(2).tolist() == [10]
    assert either.chunk_ids(3).tolist() == []


def test_only_allowed_passages_are_found_and_they_keep_their_scores(either: KeywordIndex) -> None:
    free = dict(either.search(1, "pump seal", 10))
    assert either.search(1, "pump seal", 10, allowed(2, 3, 77)) == [(2, free[2])]
    assert either.search(1, "pump seal", 10, allowed()) == []


def test_what_is_there_already_is_not_added_again(either: KeywordIndex) -> None:
    before = either.search(1, "pump seal", 10)
    either.add(1, [(1, "something else"), (2, TEXTS[1])])
    either.add(1, [])
    assert either.search(1, "pump seal", 10) == before
    assert either.search(1, "something", 10) == []


def test_what_is_removed_is_not_found(either: KeywordIndex) -> None:
    either.remove([1, 77])
    assert ids(either.search(1, "pump seal", 10)) == [2]
    either.remove([1])
    either.remove([])
    assert either.chunk_ids().tolist() == [2, 3, 4]
    either.remove([2, 3, 4])
    assert either.search(1, "boiler", 10) == []
    assert either.chunk_ids().tolist() == []


def test_a_removal_outlives_the_process(index: KeywordIndex, tmp_path: Path) -> None:
    index.flush()
    index.remove([1])
    shutil.copytree(tmp_path / "keywords", tmp_path / "as a kill leaves it")
    with closing(KeywordIndex(tmp_path / "as a kill leaves it")) as again:
        assert again.chunk_ids().tolist() == [2, 3, 4]
        assert again.last_id == 4


def test_nothing_of_what_was_erased_is_left_in_the_files(index: KeywordIndex, tmp_path: Path) -> None:
    folder = tmp_path / "keywords"
    index.add(1, [(20, f"the {MARKER} is secret"), (21, "kept")])
    index.flush()
    assert has_marker(folder)
    index.remove([20])
    index.erase()
    assert not has_marker(folder)
    assert ids(index.search(1, "kept", 10)) == [21]
    assert index.verify() == []


def test_a_closed_index_is_as_it_was_when_it_is_opened_again(either: KeywordIndex, tmp_path: Path) -> None:
    before = either.search(1, "pump seal", 10)
    either.close()
    either.close()
    with closing(KeywordIndex(tmp_path / "keywords")) as again:
        assert again.search(1, "pump seal", 10) == before
        assert again.last_id == 4
        assert again.verify() == []


def test_a_closed_index_refuses(index: KeywordIndex) -> None:
    index.close()
    for call in (lambda: index.search(1, "pump", 1), index.verify, lambda: index.add(1, [(5, "x")]), index.erase):
        with pytest.raises(StorageError, match="closed"):
            call()


def test_one_process_has_the_folder(index: KeywordIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.retrieval.segments._LOCK_WAIT_S", 0.0)
    with pytest.raises(ConflictError, match="Another process"):
        KeywordIndex(tmp_path / "keywords")


def test_what_is_written_while_passages_come_in_is_found_as_in_a_fresh_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lexical, "MOST_IN_MEMORY", 8)
    monkeypatch.setattr(lexical, "_STEP", 4)
    rows = [(n, f"{TEXTS[n % 4]} number {n}") for n in range(1, 200)]
    with closing(KeywordIndex(tmp_path / "grown")) as grown, closing(KeywordIndex(tmp_path / "fresh")) as fresh:
        for row in rows[:150]:
            grown.add(1, [row])
        grown.add(1, rows[150:])
        fresh.rebuild((1, *row) for row in rows)
        assert fresh.last_id == 199
        assert len(list((tmp_path / "grown").iterdir())) < 20
        for query in ("pump seal", "number 77", "水泵"):
            assert grown.search(1, query, 50) == fresh.search(1, query, 50)


def test_a_rebuild_replaces_everything(either: KeywordIndex, tmp_path: Path) -> None:
    either.rebuild(iter([(1, 30, f"new {MARKER}"), (2, 31, "other"), (1, 30, f"twice {MARKER}")]))
    assert either.chunk_ids().tolist() == [30, 31]
    assert ids(either.search(2, "other", 5)) == [31]
    either.rebuild(iter([]))
    assert either.chunk_ids().tolist() == []
    assert not has_marker(tmp_path / "keywords")


def test_a_rebuild_that_fails_leaves_the_old_index(
    either: KeywordIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lexical, "MOST_IN_MEMORY", 2)
    monkeypatch.setattr(lexical, "_STEP", 2)
    before = sorted(path.name for path in (tmp_path / "keywords").iterdir())

    def broken() -> Iterator[tuple[int, int, str]]:
        yield from ((1, n, "new") for n in range(10, 20))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        either.rebuild(broken())
    assert ids(either.search(1, "pump seal", 10)) == [2, 1]
    assert sorted(path.name for path in (tmp_path / "keywords").iterdir()) == before


def test_passages_wait_in_memory_until_there_are_many(
    index: KeywordIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lexical, "MOST_IN_MEMORY", 100)
    manifest = tmp_path / "keywords" / "manifest.json"
    before = manifest.stat().st_ino
    for n in range(10, 100):
        index.add(1, [(n, "one of many")])
        assert manifest.stat().st_ino == before, "nothing is written"
    for n in range(100, 106):
        index.add(1, [(n, "one of many")])
    assert manifest.stat().st_ino != before
    assert index.last_id == 105
    assert len(index.search(1, "many", 200)) == 96


# Damage


def test_a_flipped_bit_anywhere_is_noticed(index: KeywordIndex, tmp_path: Path) -> None:
    index.flush()
    index.remove([4])
    index.close()
    sound, hurt = tmp_path / "keywords", tmp_path / "hurt"
    for path in sorted(sound.iterdir()):
        for at in range(path.stat().st_size):
            shutil.copytree(sound, hurt)
            data = bytearray(path.read_bytes())
            data[at] ^= 1 << at % 8
            (hurt / path.name).write_bytes(data)
            with closing(KeywordIndex(hurt)) as opened:
                assert opened.verify(), f"{path.name}, byte {at}"
            shutil.rmtree(hurt)


@pytest.mark.parametrize("harm", ["missing", "cut off", "longer", "empty"])
@pytest.mark.parametrize("name", ["segment-*", "manifest.json"])
def test_a_file_that_is_not_as_it_was_is_noticed_and_rebuilt(
    index: KeywordIndex, tmp_path: Path, name: str, harm: str
) -> None:
    index.close()
    folder = tmp_path / "keywords"
    (path,) = folder.glob(name)
    data = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes({"cut off": data[:-1], "longer": data + b"\n", "empty": b""}[harm])
    with closing(KeywordIndex(folder)) as opened:
        assert opened.verify()
        assert opened.last_id == 0
        opened.add(1, [(50, "pump")])
    with closing(KeywordIndex(folder)) as opened:
        assert opened.verify(), "it says so until it is rebuilt"
        with pytest.raises(UnavailableError, match="damaged"):
            opened.search(1, "pump", 10)
        assert opened.chunk_ids().tolist() == [50]
        opened.rebuild((1, *row) for row in enumerate(TEXTS, 1))
        assert opened.verify() == []
        assert ids(opened.search(1, "pump seal", 10)) == [2, 1]


def test_a_body_that_changes_while_it_is_open_is_noticed(index: KeywordIndex, tmp_path: Path) -> None:
    index.flush()
    (path,) = (tmp_path / "keywords").glob("segment-*")
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x77")
    assert index.verify()
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="cut off"):
        index.search(1, "pump", 10)
    path.unlink()
    assert index.verify()
    (tmp_path / "keywords" / "manifest.json").unlink()
    assert index.verify()
    index.rebuild((1, *row) for row in enumerate(TEXTS, 1))
    assert index.verify() == []


def test_terms_of_another_version_are_made_anew(
    index: KeywordIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.close()
    monkeypatch.setattr(words, "VERSION", words.VERSION + 1)
    with closing(KeywordIndex(tmp_path / "keywords")) as opened:
        assert "version" in opened.verify()[0]
        assert opened.last_id == 0


def test_a_manifest_of_another_kind_is_damage(index: KeywordIndex, tmp_path: Path) -> None:
    index.close()
    (tmp_path / "keywords" / "manifest.json").write_bytes(b"[]\n%08x" % zlib.crc32(b"[]"))
    with closing(KeywordIndex(tmp_path / "keywords")) as opened:
        assert "another version" in opened.verify()[0]


def test_an_older_manifest_is_noticed(index: KeywordIndex, tmp_path: Path) -> None:
    manifest = tmp_path / "keywords" / "manifest.json"
    old = manifest.read_bytes()
    index.flush()
    manifest.write_bytes(old)
    assert index.verify() == ["the manifest is not the one that was written last"]


@pytest.mark.parametrize("name", ["segment-*", "manifest.json"])
def test_a_folder_in_a_files_place_is_an_error_of_the_disk(index: KeywordIndex, tmp_path: Path, name: str) -> None:
    index.close()
    (path,) = (tmp_path / "keywords").glob(name)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError):
        KeywordIndex(tmp_path / "keywords")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        KeywordIndex(tmp_path / "file" / "keywords")


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond a few bytes; Python ignores the signal, and the write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_changes_nothing_and_leaves_nothing(index: KeywordIndex, tmp_path: Path) -> None:
    index.flush()
    names = sorted(path.name for path in (tmp_path / "keywords").iterdir())
    with full_disk():
        with pytest.raises(StorageError) as failure:
            index.remove([1])
        assert failure.value.code == "disk_full"
        index.add(1, [(60, "late pump")])
        with pytest.raises(StorageError):
            index.flush()
        with pytest.raises(StorageError):
            index.rebuild((1, *row) for row in enumerate(TEXTS, 1))
    assert sorted(path.name for path in (tmp_path / "keywords").iterdir()) == names
    assert sorted(ids(index.search(1, "pump", 10))) == [1, 2, 60]
    index.flush()
    assert index.verify() == []


# Many at once


def test_searches_see_whole_states_while_passages_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "MOST_IN_MEMORY", 16)
    done = False
    with closing(KeywordIndex(tmp_path / "keywords")) as index, ThreadPoolExecutor(4) as threads:
        index.add(1, [(n, f"lasting text {n}") for n in range(1, 9)])

        def look() -> int:
            looks = 0
            while not done:
                found = index.search(1, "lasting", 50)
                assert sorted(ids(found)) == list(range(1, 9))
                twins = ids(index.search(1, "twins", 1000))
                assert len(twins) % 2 == 0
                looks += 1
            return looks

        readers = [threads.submit(look) for _ in range(3)]
        try:
            for n in range(100, 400, 2):
                index.add(1, [(n, "twins one"), (n + 1, "twins two")])
                if n % 20 == 0:
                    index.remove([n, n + 1])
                if n % 50 == 0:
                    index.erase()
        finally:
            done = True
        assert all(reader.result(30) > 0 for reader in readers)


# Kills

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from appliance.retrieval import lexical
from appliance.retrieval.lexical import KeywordIndex

lexical.MOST_IN_MEMORY = 4
marker, root = sys.argv[1], Path(sys.argv[2])


def die_at(step):
    count = 0
    def counted(call):
        def wrapped(*arguments, **named):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)
        return wrapped
    os.fsync, Path.rename, Path.unlink = counted(os.fsync), counted(Path.rename), counted(Path.unlink)


def work(folder):
    index = KeywordIndex(folder)
    for n in range(1, 13):
        index.add(1 + n % 2, [(n, f"pump number {n}" + (f" {marker}" if n == 5 else ""))])
    print("added", flush=True)
    index.remove([5, 6])
    print("removed", flush=True)
    index.erase()
    print("erased", flush=True)
    index.rebuild([(1 + n % 2, n, f"pump number {n}") for n in range(1, 13) if n not in (5, 6)])
    index.close()


for step in range(1, 1000):
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(say, 1)
        die_at(step)
        work(root / str(step))
        os._exit(0)
    os.close(say)
    _, status = os.waitpid(child, 0)
    print(json.dumps([step, os.waitstatus_to_exitcode(status), os.read(said, 1000).decode().split()]), flush=True)
    os.close(said)
    if status == 0:
        break
"""


def test_a_kill_at_any_step_leaves_an_index_that_catches_up_to_a_fresh_one(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, MARKER, str(tmp_path)], capture_output=True, text=True, timeout=100, check=True
    )
    outcomes = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(outcomes) > 20
    assert {status for _, status, _ in outcomes[:-1]} == {-signal.SIGKILL}
    truth = {n: f"pump number {n}" for n in range(1, 13) if n not in (5, 6)}
    with closing(KeywordIndex(tmp_path / "fresh")) as fresh:
        fresh.rebuild((1 + n % 2, n, text) for n, text in truth.items())
        expected = [fresh.search(store, "pump number 7", 50) for store in (1, 2)]
    for step, _, said in outcomes:
        folder = tmp_path / str(step)
        if "erased" in said:
            assert not has_marker(folder), step
        with closing(KeywordIndex(folder)) as index:
            assert index.verify() == [], step
            found = set(index.chunk_ids().tolist())
            assert found <= set(range(1, 13)), step
            assert all(n in found for n in truth if n <= index.last_id), step
            if "removed" in said:
                assert not found & {5, 6}, step
            for n in truth.keys() - found:
                index.add(1 + n % 2, [(n, truth[n])])
            index.remove(sorted(found - truth.keys()))
            index.erase()
            assert [index.search(store, "pump number 7", 50) for store in (1, 2)] == expected, step
            assert not has_marker(folder), step


# Any order of things


class AnyOrder(RuleBasedStateMachine):
    """The index beside a dict, under every order of changes."""

    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(lexical, "MOST_IN_MEMORY", 5)
        self.folder = Path(tempfile.mkdtemp())
        self.index = KeywordIndex(self.folder)
        self.truth: dict[int, tuple[int, str]] = {}
        self.next_id = 1

    @rule(store=st.integers(1, 2), texts=st.lists(st.text(st.sampled_from("ab 水火"), max_size=6), max_size=4))
    def add(self, store: int, texts: list[str]) -> None:
        rows = list(enumerate(texts, self.next_id))
        self.index.add(store, rows)
        self.truth |= {chunk_id: (store, text) for chunk_id, text in rows}
        self.next_id += len(texts)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.integers(1, self.next_id), max_size=3))
        self.index.remove(gone)
        self.truth = {chunk_id: each for chunk_id, each in self.truth.items() if chunk_id not in gone}

    @rule()
    def erase(self) -> None:
        self.index.erase()

    @rule()
    def rebuild(self) -> None:
        self.index.rebuild((store, chunk_id, text) for chunk_id, (store, text) in self.truth.items())

    @rule()
    def open_again(self) -> None:
        self.index.close()
        self.index = KeywordIndex(self.folder)

    @invariant()
    def it_finds_what_there_is(self) -> None:
        assert self.index.verify() == []
        assert self.index.chunk_ids().tolist() == sorted(self.truth)
        for store in (1, 2):
            for query in ("a", "水", "ab 火"):
                terms = set(words.query_terms(query))
                expected = {
                    chunk_id
                    for chunk_id, (of, text) in self.truth.items()
                    if of == store and terms & set(words.passage_terms(text))
                }
                assert set(ids(self.index.search(store, query, 100))) == expected

    def teardown(self) -> None:
        self.index.close()
        shutil.rmtree(self.folder)
        self.patch.undo()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
