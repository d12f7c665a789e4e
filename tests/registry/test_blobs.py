from __future__ import annotations

import hashlib
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appliance.core.errors import ConflictError, NotFoundError, StorageError
from appliance.registry.blobs import SPARE_BYTES, STALE_PARTIAL_S, Blobs, Edition
from appliance.store.locks import holders, lock

CONTENT = b"content " * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def publish(blobs: Blobs, content: bytes = CONTENT) -> str:
    digest = hashlib.sha256(content).hexdigest()
    with blobs.partial(digest) as partial:
        partial.restart()
        partial.append(content)
        partial.publish(digest)
    return digest


def partial_names(blobs: Blobs) -> list[str]:
    return sorted(each.name for each in blobs.partial_folder.iterdir())


def test_a_published_blob_is_whole_read_only_and_named_after_its_hash(blobs: Blobs) -> None:
    assert publish(blobs) == DIGEST
    path = blobs.path(DIGEST)
    assert path.name == f"sha256-{DIGEST}"
    assert path.read_bytes() == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert blobs.has(DIGEST, len(CONTENT))
    assert not blobs.has(DIGEST, len(CONTENT) - 1)
    assert partial_names(blobs) == []


def test_nothing_is_visible_before_it_is_published(blobs: Blobs) -> None:
    with blobs.partial(DIGEST) as partial:
        partial.append(CONTENT)
        assert not blobs.has(DIGEST, len(CONTENT))
        assert not blobs.folder.exists()


def test_what_was_written_is_there_for_the_next_attempt(blobs: Blobs) -> None:
    with blobs.partial(DIGEST) as partial:
        partial.append(CONTENT[:3000])
        partial.edition = Edition("https://host/file", '"tag"')
    with blobs.partial(DIGEST) as partial:
        assert partial.size == 3000
        assert partial.edition == Edition("https://host/file", '"tag"')
        partial.append(CONTENT[3000:])
        partial.publish(DIGEST)
    assert blobs.path(DIGEST).read_bytes() == CONTENT
    assert partial_names(blobs) == []


def test_an_empty_attempt_leaves_nothing(blobs: Blobs) -> None:
    with blobs.partial(DIGEST):
        pass
    assert partial_names(blobs) == []


def test_a_torn_note_of_the_edition_is_as_none(blobs: Blobs) -> None:
    with blobs.partial(DIGEST) as partial:
        partial.append(b"x")
        partial.edition = Edition("https://host/file", '"tag"')
        partial.path.with_name(f"{partial.path.name}.etag").write_bytes(b'{"url": "https://ho')
        assert partial.edition is None


def test_restarting_drops_content_and_edition(blobs: Blobs) -> None:
    with blobs.partial(DIGEST) as partial:
        partial.append(CONTENT)
        partial.edition = Edition("https://host/file", '"tag"')
        partial.restart()
        assert partial.size == 0
        assert partial.edition is None


def test_two_cannot_fetch_the_same_file_and_the_second_is_told_who_does(blobs: Blobs) -> None:
    with blobs.partial(DIGEST) as first:
        first.append(b"first")
        with pytest.raises(ConflictError, match=f"process {os.getpid()}"):
            blobs.partial(DIGEST)
        assert first.path.read_bytes() == b"first"
    with blobs.partial(DIGEST) as second:
        assert second.size == 5


def test_publishing_keeps_the_blob_from_removal_until_it_is_closed(blobs: Blobs) -> None:
    with blobs.partial(DIGEST) as partial:
        partial.append(CONTENT)
        partial.publish(DIGEST)
        assert blobs.remove_unused(lambda _: False) == 0
        assert blobs.has(DIGEST, len(CONTENT))
    assert blobs.remove_unused(lambda _: False) == len(CONTENT)
    assert not blobs.has(DIGEST, len(CONTENT))


def test_publishing_what_is_there_already_leaves_the_first_in_place_and_held(blobs: Blobs) -> None:
    publish(blobs)
    inode = blobs.path(DIGEST).stat().st_ino
    with blobs.unnamed_partial() as partial:
        partial.append(CONTENT)
        partial.publish(DIGEST)
        assert blobs.path(DIGEST).stat().st_ino == inode
        assert blobs.remove_unused(lambda _: False) == 0
    assert partial_names(blobs) == []


def test_a_blob_that_was_cut_off_is_replaced_unless_it_is_in_use(blobs: Blobs) -> None:
    publish(blobs)
    blobs.path(DIGEST).chmod(0o644)
    os.truncate(blobs.path(DIGEST), 10)
    with blobs.hold([DIGEST]), pytest.raises(ConflictError, match="in use"):
        publish(blobs)
    assert blobs.path(DIGEST).stat().st_size == 10
    publish(blobs)
    assert blobs.path(DIGEST).read_bytes() == CONTENT


def test_a_held_blob_is_not_removed_and_many_may_hold_it(blobs: Blobs) -> None:
    publish(blobs)
    first, second = blobs.hold([DIGEST]), blobs.hold([DIGEST])
    first.close()
    with pytest.raises(ConflictError, match=f"in use by process {os.getpid()}"), blobs.exclusively([DIGEST]):
        raise AssertionError("got the lock")
    assert blobs.remove_unused(lambda _: False) == 0
    second.close()
    second.close()
    assert blobs.remove_unused(lambda _: False) == len(CONTENT)


def test_holding_what_is_missing_is_refused_and_holds_nothing(blobs: Blobs) -> None:
    publish(blobs)
    with pytest.raises(NotFoundError, match="missing"):
        blobs.hold([DIGEST, "0" * 64])
    assert holders(blobs.path(DIGEST)) == []


def test_holding_waits_for_a_removal_and_then_finds_it_gone(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(blobs)
    monkeypatch.setattr("appliance.registry.blobs._HOLD_WAIT_S", 0.1)
    with blobs.exclusively([DIGEST]), pytest.raises(ConflictError, match="being removed"):
        blobs.hold([DIGEST])


def test_a_lock_on_a_file_that_was_exchanged_meanwhile_counts_for_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    old = lock(path, os.O_RDONLY, exclusive=True)
    path.unlink()
    path.write_text("new")
    new = lock(path, os.O_RDONLY, exclusive=True)
    assert os.read(new, 3) == b"new"
    os.close(old)
    os.close(new)


def test_whoever_waits_for_a_file_that_is_removed_meanwhile_finds_it_missing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("going")
    first = lock(path, os.O_RDONLY, exclusive=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lock, path, os.O_RDONLY, exclusive=False, wait_s=20)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        path.unlink()
        os.close(first)
        with pytest.raises(FileNotFoundError):
            waiting.result(timeout=20)


def test_a_link_in_place_of_a_blob_is_not_followed(blobs: Blobs, tmp_path: Path) -> None:
    publish(blobs)
    blobs.path(DIGEST).unlink()
    (tmp_path / "secret").write_bytes(CONTENT)
    blobs.path(DIGEST).symlink_to(tmp_path / "secret")
    with pytest.raises(StorageError):
        blobs.hold([DIGEST])


def test_only_unused_blobs_are_removed(blobs: Blobs) -> None:
    kept, unused = publish(blobs, b"kept"), publish(blobs, b"unused")
    (blobs.folder / "README").write_text("not a blob")
    assert blobs.remove_unused(lambda digest: digest == kept) == len(b"unused")
    assert sorted(each.name for each in blobs.folder.iterdir()) == ["README", f"sha256-{kept}"]
    assert not blobs.has(unused, len(b"unused"))


def test_a_blob_that_comes_into_use_while_it_is_locked_for_removal_stays(blobs: Blobs) -> None:
    digest = publish(blobs)
    answers = iter([False, True])
    assert blobs.remove_unused(lambda _: next(answers)) == 0
    assert blobs.has(digest, len(CONTENT))


def test_stale_partials_and_orphaned_imports_go_and_fresh_or_busy_ones_stay(blobs: Blobs) -> None:
    for digest in ("a" * 64, "b" * 64, "c" * 64):
        with blobs.partial(digest) as partial:
            partial.append(b"x")
    stale = time.time() - STALE_PARTIAL_S - 60
    folder = blobs.partial_folder
    (folder / f"pip-{'d' * 64}").mkdir()
    (folder / "import-1-2").write_bytes(b"of a process that was killed")
    for name in (f"sha256-{'a' * 64}", f"sha256-{'c' * 64}", f"pip-{'d' * 64}"):
        os.utime(folder / name, (stale, stale))
    with blobs.partial("c" * 64), blobs.unnamed_partial() as busy:
        busy.append(b"x")
        blobs.remove_stale_partials()
        assert partial_names(blobs) == sorted([busy.path.name, f"sha256-{'b' * 64}", f"sha256-{'c' * 64}"])


def test_a_full_disk_is_told_with_figures_before_anything_is_written(blobs: Blobs) -> None:
    with pytest.raises(
        StorageError, match=r"17,592,186\.0 MB are needed and 67\.1 MB in reserve, .* MB are free"
    ) as full:
        blobs.require_space(2**44, "fetch it")
    assert full.value.code == "disk_full"
    assert list(blobs.partial_folder.iterdir()) == []
    assert SPARE_BYTES == 64 * 2**20


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    blobs = Blobs(tmp_path / "models" / "blobs")
    with pytest.raises(StorageError):
        blobs.require_space(1, "fetch it")
    with pytest.raises(StorageError):
        blobs.partial(DIGEST)


def test_holders_of_a_missing_file_are_none(tmp_path: Path) -> None:
    assert holders(tmp_path / "missing") == []


def test_a_partial_file_that_is_finished_with_while_others_are_swept_disturbs_nobody(blobs: Blobs) -> None:
    blobs.partial_folder.mkdir(parents=True)
    orphan = blobs.partial_folder / "import-orphan"
    orphan.touch()
    (blobs.partial_folder / "import-gone").symlink_to("nowhere")  # listed, and not there when it is looked at
    blobs.remove_stale_partials()
    assert not orphan.exists()
