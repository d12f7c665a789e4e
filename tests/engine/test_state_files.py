"""Parked states on a real disk: whole or not there, whatever happens to the process, the disk or the files."""

from __future__ import annotations

import logging
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from appliance.core.errors import ConflictError, StorageError
from appliance.engine.llama import state_files
from appliance.engine.llama.state_files import Payload, StateFiles, new_id, remove_foreign
from appliance.engine.llama.state_format import StateHead, read_head
from tests.engine.states import FINGERPRINT, ORIGIN, state

DEADLINE_S = 60.0


@pytest.fixture
def files(tmp_path: Path) -> Iterator[StateFiles]:
    subject = StateFiles(tmp_path / "kv", FINGERPRINT)
    yield subject
    subject.close()


def written(files: StateFiles, seed: int = 0, *, space: str = "") -> tuple[StateHead, Payload, Path]:
    head, payload = state(seed, space=space)
    files.write(head, payload)
    return head, payload, files.path / f"{head.id}.kv"


def read(files: StateFiles, head: StateHead) -> Payload:
    payload = files.read(head)
    assert payload is not None
    return payload


def names(files: StateFiles) -> set[str]:
    return {each.name for each in files.path.iterdir()}


def reopened(files: StateFiles) -> StateFiles:
    files.close()
    return StateFiles(files.path.parent, files.path.name)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=Path(__file__).parents[2]
    )


# What is written is read


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 3 * 2**20 + 7])
@pytest.mark.parametrize("tokens", [0, 1, 1500])
def test_what_was_written_is_read(files: StateFiles, size: int, tokens: int) -> None:
    head, payload = state(size=size, tokens=tokens, space="a" * (tokens % 1000))
    files.write(head, payload)
    memory = np.zeros(size, np.uint8)
    assert files.read(head, memory) is memory
    assert np.array_equal(memory, payload)
    assert np.array_equal(read(files, head), payload)
    assert files.scan() == [head]


def test_after_a_restart_states_come_in_the_order_of_their_use(files: StateFiles) -> None:
    heads = [written(files, seed)[0] for seed in range(5)]
    files.touch(heads[1].id)
    files = reopened(files)
    files.touch(heads[0].id)
    expected = [heads[index] for index in (2, 3, 4, 1, 0)]
    assert files.scan() == expected
    assert reopened(files).scan() == expected


def test_the_order_holds_though_the_clock_is_set_back(files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [written(files, seed)[0] for seed in range(2)]
    monkeypatch.setattr(time, "time_ns", lambda: 10**9)
    files = reopened(files)
    assert files.scan() == heads
    files.touch(heads[0].id)
    assert files.scan() == [heads[1], heads[0]]


def test_nobody_else_may_read_and_no_name_tells_the_text(files: StateFiles) -> None:
    head, _, path = written(files, space="secret-adapter")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(files.path.parent.stat().st_mode) == 0o700
    assert names(files) == {f"{head.id}.kv"}
    other, _ = state()
    assert other.id != head.id, "the same text has another name each time"


def test_a_folder_that_others_could_enter_is_closed_to_them(files: StateFiles) -> None:
    files.path.chmod(0o755)
    reopened(files).close()
    assert stat.S_IMODE(files.path.stat().st_mode) == 0o700


def test_a_file_has_its_name_only_when_it_is_on_the_disk(files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("write", "fsync", "rename"):

        def spy(*arguments: object, real: object = getattr(os, name), name: str = name, **more: object) -> object:
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)  # type: ignore[arg-type]
            calls.append(f"{name} folder" if folder else name)
            return real(*arguments, **more)  # type: ignore[operator]

        monkeypatch.setattr(os, name, spy)
    written(files)
    assert calls == ["write", "write", "fsync", "rename", "fsync folder"]


def test_what_is_erased_is_gone(files: StateFiles) -> None:
    heads = [written(files, seed)[0] for seed in range(3)]
    files.erase(heads[0].id)
    files.erase(heads[0].id)
    assert files.scan() == heads[1:]
    (files.path / f"{new_id()}.partial").write_bytes(b"a part of a conversation")
    files.erase_all()
    assert names(files) == set()
    assert files.read(heads[1]) is None


@pytest.mark.parametrize("size", [4999, 5001])
def test_memory_of_another_size_is_refused_and_nothing_changes(files: StateFiles, size: int) -> None:
    head, payload, _ = written(files)
    with pytest.raises(ValueError, match="5000 bytes"):
        files.read(head, np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match="5000 bytes"):
        files.write(replace(head, id=new_id()), np.zeros(size, np.uint8))
    assert files.scan() == [head]
    assert np.array_equal(read(files, head), payload)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 32, "0" * 31, "0" * 32 + "\n"])
def test_only_ids_of_ours_become_names(files: StateFiles, name: str) -> None:
    head, payload = state()
    with pytest.raises(ValueError, match="id"):
        files.write(replace(head, id=name), payload)
    with pytest.raises(ValueError, match="id"):
        files.erase(name)
    assert names(files) == set()


def test_an_endless_space_is_refused(files: StateFiles) -> None:
    head, payload = state(space="x" * 1025)
    with pytest.raises(ValueError, match="1025"):
        files.write(head, payload)


@pytest.mark.parametrize(
    "change",
    [
        {"model_sha256": "cd" * 32},
        {"library": "0.3.37"},
        {"cells": 4096},
        {"key_type": "q8_0"},
        {"value_type": "q8_0"},
        {"flash_attention": True},
        {"full_window": False},
    ],
)
def test_states_of_another_origin_are_not_found(files: StateFiles, tmp_path: Path, change: dict[str, object]) -> None:
    written(files)
    other = StateFiles(tmp_path / "kv", replace(ORIGIN, **change).fingerprint)  # type: ignore[arg-type]
    assert other.scan() == []
    other.close()
    assert replace(ORIGIN).fingerprint == FINGERPRINT


# Poison

FIELDS = {
    "magic": 0,
    "version": 8,
    "id": 12,
    "fingerprint": 28,
    "space length": 60,
    "session length": 64,
    "token count": 68,
    "payload size": 72,
    "payload digest": 80,
    "space": 112,
    "a token": 112 + 4 + 4 * 7,
    "head digest": 112 + 4 + 4 * 40,
}
PAYLOAD = 112 + 4 + 4 * 40 + 32


def is_dropped(files: StateFiles, head: StateHead, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert files.read(head) is None
    assert head.id in caplog.text
    assert not os.path.lexists(path)
    assert files.scan() == []


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_bit_in_the_head_is_found_by_the_scan_and_by_reading(
    files: StateFiles, caplog: pytest.LogCaptureFixture, field: str, bit: int
) -> None:
    for by_scan in (True, False):
        head, _, path = written(files, space="base")
        data = bytearray(path.read_bytes())
        assert len(data) == PAYLOAD + head.size
        data[FIELDS[field]] ^= 1 << bit
        path.write_bytes(data)
        if by_scan:
            assert files.scan() == []
            assert names(files) == set()
        else:
            is_dropped(files, head, path, caplog)


def test_no_byte_of_a_file_can_change_unnoticed(files: StateFiles) -> None:
    head, payload = state(size=64, tokens=10, space="base")
    files.write(head, payload)
    path = files.path / f"{head.id}.kv"
    sound = path.read_bytes()
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x10]) + sound[place + 1 :])
        assert files.read(head) is None, place
        assert not path.exists()
    path.write_bytes(sound)
    assert np.array_equal(read(files, head), payload)


@pytest.mark.parametrize("place", [PAYLOAD, PAYLOAD + 2500, PAYLOAD + 4999])
def test_a_flipped_bit_in_the_payload_is_found_when_it_is_read(
    files: StateFiles, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    head, _, path = written(files, space="base")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert files.scan() == [head], "only heads are looked at"
    is_dropped(files, head, path, caplog)


@pytest.mark.parametrize("length", [0, 1, 111, 112, 115, PAYLOAD - 1, PAYLOAD, PAYLOAD + 4999, PAYLOAD + 5001])
def test_a_file_that_is_too_short_or_too_long_is_dropped(
    files: StateFiles, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    for by_scan in (True, False):
        head, _, path = written(files, space="base")
        os.truncate(path, length)
        if by_scan:
            assert files.scan() == []
            assert names(files) == set()
        else:
            is_dropped(files, head, path, caplog)


@pytest.mark.parametrize(
    ("field", "value"),
    [("space length", 2**32 - 1), ("token count", 2**32 - 1), ("payload size", 2**64 - 1), ("payload size", 2**62)],
)
def test_no_memory_is_taken_for_lengths_that_lie(files: StateFiles, field: str, value: int) -> None:
    _, _, path = written(files, space="base")
    data = bytearray(path.read_bytes())
    width = 8 if field == "payload size" else 4
    data[FIELDS[field] : FIELDS[field] + width] = value.to_bytes(width, sys.byteorder)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert files.scan() == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024
    assert names(files) == set()


def test_a_huge_head_in_a_huge_sparse_file_is_not_read(files: StateFiles) -> None:
    _, _, path = written(files, space="base")
    data = bytearray(path.read_bytes()[:PAYLOAD])
    data[64:68] = (2**30).to_bytes(4, sys.byteorder)
    path.write_bytes(data)
    os.truncate(path, 108 + 4 + 4 * 2**30 + 32 + 5000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert files.scan() == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024


def test_a_state_under_anothers_name_is_dropped(files: StateFiles, caplog: pytest.LogCaptureFixture) -> None:
    one, _, one_path = written(files, 1)
    other, _, other_path = written(files, 2)
    data = one_path.read_bytes()
    one_path.write_bytes(other_path.read_bytes())
    other_path.write_bytes(data)
    assert files.read(one) is None
    assert files.read(other) is None
    assert names(files) == set()


def test_a_state_of_another_origin_in_our_folder_is_dropped(files: StateFiles, tmp_path: Path) -> None:
    other = StateFiles(tmp_path / "kv", replace(ORIGIN, cells=1).fingerprint)
    _, _, path = written(other)
    path.rename(files.path / path.name)
    other.close()
    assert files.scan() == []
    assert names(files) == set()


@pytest.mark.parametrize("change", ["tokens", "space"])
def test_a_sound_file_of_other_tokens_than_expected_is_dropped(
    files: StateFiles, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    head, _, path = written(files)
    expected = replace(head, tokens=head.tokens[:-1]) if change == "tokens" else replace(head, space="adapter")
    is_dropped(files, expected, path, caplog)


def test_a_file_that_was_deleted_meanwhile_is_only_missed(files: StateFiles, caplog: pytest.LogCaptureFixture) -> None:
    head, _, path = written(files)
    path.unlink()
    is_dropped(files, head, path, caplog)
    files.touch(head.id)


def test_a_file_that_shrinks_while_it_is_read_is_dropped(
    files: StateFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, _, path = written(files)

    def read_and_cut(file: FileIO, *arguments: str) -> tuple[StateHead, bytes]:
        found = read_head(file, *arguments)
        os.truncate(path, file.tell() + 2000)
        return found

    monkeypatch.setattr(state_files, "read_head", read_and_cut)
    is_dropped(files, head, path, caplog)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "folder for partial"])
def test_what_is_no_file_is_not_followed_not_waited_for_and_harms_nobody(
    files: StateFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    victim, _, victim_path = written(files, 1)
    outside = tmp_path / "outside"
    outside.write_bytes(victim_path.read_bytes())
    head, payload = state(2)
    path = files.path / f"{head.id}.{'partial' if 'partial' in kind else 'kv'}"
    if kind == "symlink":
        path.symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert files.scan() == [victim]
    assert outside.exists()
    assert path.exists() == ("folder" in kind)
    if "folder" in kind:
        assert "cannot be deleted" in caplog.text
        with pytest.raises(StorageError):
            files.write(head, payload)
        assert path.is_dir()
        assert not (files.path / f"{head.id}.{'kv' if 'partial' in kind else 'partial'}").exists()
        assert files.scan() == [victim]


def test_leftovers_go_and_what_is_not_ours_stays(files: StateFiles) -> None:
    head, _, _ = written(files)
    for name in (f"{new_id()}.partial", "short.kv", "notes.txt"):
        (files.path / name).write_bytes(b"x")
    assert files.scan() == [head]
    assert names(files) == {f"{head.id}.kv", "notes.txt"}


# Another process


def test_a_second_process_gets_its_own_folder_or_none(files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "_LOCK_WAIT_S", 0.05)
    head, _, _ = written(files)
    program = (
        "import sys; from pathlib import Path; from appliance.core.errors import ConflictError\n"
        "from appliance.engine.llama import state_files\n"
        "state_files._LOCK_WAIT_S = 0.05\n"
        "state_files.remove_foreign(Path(sys.argv[1]), [])\n"
        "try: state_files.StateFiles(Path(sys.argv[1]), sys.argv[2])\n"
        "except ConflictError as error: print(error.advice)"
    )
    result = run(sys.executable, "-c", program, files.path.parent, files.path.name)
    assert result.stdout == "Give each server a data folder of its own.\n", result.stderr
    with pytest.raises(ConflictError):
        StateFiles(files.path.parent, files.path.name)
    assert files.scan() == [head]
    files.close()
    reopened(files).close()


def test_abandoned_folders_of_other_origins_go(files: StateFiles, tmp_path: Path) -> None:
    root = tmp_path / "kv"
    kept, busy, gone, shared = (replace(ORIGIN, cells=each).fingerprint for each in range(4))
    opened = {each: StateFiles(root, each) for each in (kept, busy, gone, shared)}
    for name, folder in opened.items():
        written(folder)
        if name != busy:
            folder.close()
    (root / shared / "notes.txt").write_text("not ours")
    (root / ("0" * 64)).symlink_to(root / kept)
    (root / "lost+found").mkdir()
    remove_foreign(root, {kept, FINGERPRINT})
    assert {each.name for each in root.iterdir()} == {kept, busy, shared, FINGERPRINT, "0" * 64, "lost+found"}
    assert len(opened[busy].scan()) == 1
    assert {each.name for each in (root / shared).iterdir()} == {"notes.txt"}
    opened[busy].close()
    remove_foreign(tmp_path / "missing", [])


def test_a_root_that_is_no_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("a file where the folder should be")
    with pytest.raises(StorageError):
        StateFiles(tmp_path / "kv", FINGERPRINT)
    with pytest.raises(StorageError):
        remove_foreign(tmp_path / "kv", [])


# Killed while writing

KILL_AT_EVERY_CALL = """
import os, signal, sys
from pathlib import Path
from tests.engine.states import FINGERPRINT, state
from appliance.engine.llama.state_files import StateFiles

root = Path(sys.argv[1])

def write_until(last_call):
    calls = 0
    def deadly(real, half):
        def call(*arguments, **more):
            nonlocal calls
            calls += 1
            if calls == last_call:
                if half:
                    real(arguments[0], arguments[1][:len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)
        return call
    files = StateFiles(root, FINGERPRINT)
    for name in ("open", "write", "fsync", "close", "rename", "utime"):
        setattr(os, name, deadly(getattr(os, name), name == "write"))
    files.write(*state(last_call))
    os._exit(0)

survivors = {}
for last_call in range(1, 100):
    child = os.fork()
    if child == 0:
        write_until(last_call)
    status = os.waitpid(child, 0)[1]
    files = StateFiles(root, FINGERPRINT)
    for head in files.scan():
        number = survivors.setdefault(head.id, last_call)
        expected, payload = state(number)
        assert head.tokens == expected.tokens
        assert (files.read(head) == payload).all()
    on_disk = {each.name for each in files.path.iterdir()}
    assert on_disk == {f"{each}.kv" for each in survivors}, on_disk
    files.close()
    if os.WIFEXITED(status):
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
print(last_call - 1, sorted(survivors.values()))
"""


def test_a_kill_at_any_call_leaves_whole_states_and_no_leftovers(tmp_path: Path) -> None:
    result = run(sys.executable, "-c", KILL_AT_EVERY_CALL, tmp_path / "kv")
    # open, write, write, fsync, close, rename; then the file has its name: fsync, utime; and once in peace.
    assert result.stdout == "8 [7, 8, 9]\n", result.stderr


KILL_AT_ANY_TIME = """
import os, random, select, signal, sys
from pathlib import Path
from tests.engine.states import FINGERPRINT, state
from appliance.engine.llama.state_files import StateFiles

root, rounds = Path(sys.argv[1]), int(sys.argv[2])
moments = random.Random(sys.argv[3])

def write_for_ever(pipe):
    files = StateFiles(root, FINGERPRINT)
    for head in files.scan()[:-3]:
        files.erase(head.id)
    seed = os.getpid()
    while True:
        head, payload = state(seed, size=200_000 + seed % 7 * 300_000)
        files.write(head, payload)
        os.write(pipe, head.id.encode())
        seed += 1

seen = leftovers = 0
for _ in range(rounds):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        write_for_ever(writing)
    os.close(writing)
    acknowledged = os.read(reading, 32)
    select.select([], [], [], moments.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 2**16):
        acknowledged += more
    os.close(reading)
    files = StateFiles(root, FINGERPRINT)
    leftovers += any(each.suffix == ".partial" for each in files.path.iterdir())
    heads = files.scan()
    on_disk = {each.id for each in heads}
    assert {acknowledged[at : at + 32].decode() for at in range(0, len(acknowledged), 32)} <= on_disk
    assert all(files.read(each) is not None for each in heads)
    assert {each.name for each in files.path.iterdir()} == {f"{each}.kv" for each in on_disk}
    seen += len(heads)
    files.close()
print(rounds, seen, leftovers)
"""


@pytest.mark.slow
def test_a_kill_at_any_time_loses_nothing_that_was_written_and_leaves_nothing_half(tmp_path: Path) -> None:
    rounds = 30
    result = run(sys.executable, "-c", KILL_AT_ANY_TIME, tmp_path / "kv", str(rounds), "a seed")
    assert result.returncode == 0, result.stderr
    done, seen, leftovers = map(int, result.stdout.split())
    assert done == rounds
    assert seen >= rounds
    assert leftovers > 0, "none was killed in the middle of a file: the test shows nothing"


# Full disks


def test_a_disk_that_would_be_too_full_is_left_alone(files: StateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    head, payload = state()
    free = os.statvfs(files.path).f_bavail * os.statvfs(files.path).f_frsize
    monkeypatch.setattr(state_files, "LARGEST_RESERVE_BYTES", 2**62)
    monkeypatch.setattr(state_files, "RESERVE_SHARE", 1.0)
    with pytest.raises(StorageError, match=r"5,\d\d\d bytes are needed and [\d,]+ in reserve, [\d,]+ are free") as full:
        files.write(head, payload)
    assert full.value.code == "disk_full"
    assert free > 0
    assert names(files) == set()


def test_a_disk_that_fills_up_in_the_middle_of_a_file_changes_nothing(files: StateFiles) -> None:
    kept, kept_payload, _ = written(files, 1)
    head, payload = state(2, size=100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StorageError) as full:
            files.write(head, payload)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.value.code == "disk_full"
    assert names(files) == {f"{kept.id}.kv"}
    assert np.array_equal(read(files, kept), kept_payload)
    files.write(head, payload)
    assert files.scan() == [kept, head]


FILL_THE_DISK = """
import os, sys
from pathlib import Path
from appliance.core.errors import StorageError
from appliance.engine.llama import state_files
from tests.engine.states import FINGERPRINT, state

def fill(files):
    done = []
    while True:
        head, payload = state(len(done), size=300_000)
        try:
            files.write(head, payload)
        except StorageError as error:
            on_disk = {each.name for each in files.path.iterdir()}
            whole = all((files.read(each) == state(seed, size=300_000)[1]).all() for seed, each in enumerate(done))
            print(error.code, len(done) > 3, on_disk == {f"{each.id}.kv" for each in done}, whole, flush=True)
            return done
        done.append(head)

files = state_files.StateFiles(Path(sys.argv[1]) / "kv", FINGERPRINT)
done = fill(files)
free = os.statvfs(files.path)
print(0.05 <= free.f_bavail / free.f_blocks < 0.2)
state_files.LARGEST_RESERVE_BYTES = -10**9
for head in done:
    files.erase(head.id)
done = fill(files)
files.erase(done[0].id)
files.write(*state(1, size=300_000))
print(len(files.scan()) == len(done))
"""


def test_a_full_disk_is_reported_and_every_state_on_it_is_kept(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=4m none "$1"'
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if run(*in_namespace, mount, "sh", tmp_path).returncode:
        pytest.skip("this system lets no user mount a small file system in a namespace of his own")
    fill = f'{mount} && exec "$2" -c "$3" "$1"'
    result = run(*in_namespace, fill, "sh", tmp_path, sys.executable, FILL_THE_DISK)
    expected = "disk_full True True True\nTrue\ndisk_full True True True\nTrue\n"
    assert (result.stdout, result.returncode) == (expected, 0), result.stderr
