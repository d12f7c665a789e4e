"""A folder for intermediate files: there while it is needed, and never longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from appliance.core.errors import StorageError
from appliance.registry.blobs import Blobs
from appliance.registry.work_folder import work_folder
from appliance.store.locks import lock
from tests.registry.processes import REPOSITORY, environment

_WORKER = """
import sys
from pathlib import Path
from appliance.registry.blobs import Blobs
from appliance.registry.work_folder import work_folder
with work_folder(Blobs(Path(sys.argv[1])), 1, "work") as folder:
    (folder / "file").write_text("content")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_it_is_empty_and_goes_with_all_that_is_in_it(blobs: Blobs) -> None:
    with work_folder(blobs, 1, "work") as folder:
        assert list(folder.iterdir()) == []
        assert folder.parent == blobs.partial_folder
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
    assert list(blobs.partial_folder.iterdir()) == []


def test_it_goes_when_the_work_fails(blobs: Blobs) -> None:
    def work() -> None:
        with work_folder(blobs, 1, "work") as folder:
            (folder / "file").write_text("content")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(blobs.partial_folder.iterdir()) == []


def test_another_process_s_stays_until_that_process_has_ended(blobs: Blobs) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(blobs.folder)],
        env=environment(),
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout is not None
        theirs = Path(worker.stdout.readline().strip())
        with work_folder(blobs, 1, "work"):
            assert (theirs / "file").read_text() == "content"
        worker.kill()
        worker.wait(20)
    assert theirs.exists()
    with work_folder(blobs, 1, "work"):
        assert not theirs.exists()


def test_it_is_made_again_if_somebody_tidies_it_up_at_once(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Path] = []

    def late(path: Path, flags: int, *, exclusive: bool, wait_s: float = 0.0) -> int:
        if not taken:
            taken.append(path)
            path.rmdir()
        return lock(path, flags, exclusive=exclusive, wait_s=wait_s)

    monkeypatch.setattr("appliance.registry.work_folder.lock", late)
    with work_folder(blobs, 1, "work") as folder:
        assert taken == [folder]
        assert folder.is_dir()


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(blobs: Blobs) -> None:
    with (
        pytest.raises(StorageError, match=r"too full to quantise x: 1,000,000,000,000.0 MB are needed"),
        work_folder(blobs, 10**18, "quantise x"),
    ):
        pass
    assert list(blobs.partial_folder.iterdir()) == []
