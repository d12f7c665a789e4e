"""A folder for intermediate files of the size of a model, on the models' own disk and gone whatever happens.

partial/work-<process>-<number>/    locked by its process; without it, it goes before the next one is made
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.registry.blobs import Blobs
from appliance.registry.files import storage_errors
from appliance.store.locks import Hold, lock

_WORK = "work-"


@contextmanager
def work_folder(blobs: Blobs, needed: int, purpose: str) -> Iterator[Path]:
    """Yield an empty folder that is deleted afterwards.

    Args:
        blobs: Beside whose folder it is.
        needed: Bytes that will be written into it at most.
        purpose: What for, as in "The disk is too full to …".

    Raises:
        StorageError: The disk is too full, or failed.
    """
    _remove_abandoned(blobs.partial_folder)
    blobs.require_space(needed, purpose)
    folder = blobs.partial_folder / f"{_WORK}{os.getpid()}-{time.monotonic_ns()}"
    with Hold([_make(folder)]):
        try:
            yield folder
        finally:
            with storage_errors(folder):
                shutil.rmtree(folder)


def _make(folder: Path) -> int:
    """Make the folder and return a descriptor that locks it."""
    with storage_errors(folder):
        while True:
            folder.mkdir(exist_ok=True)
            try:
                return lock(folder, os.O_RDONLY, exclusive=True, wait_s=1.0)
            except FileNotFoundError:
                continue  # somebody who tidies up took it before it was locked


def _remove_abandoned(parent: Path) -> None:
    with storage_errors(parent):
        for path in sorted(parent.glob(f"{_WORK}*")):
            try:
                descriptor = lock(path, os.O_RDONLY | os.O_DIRECTORY, exclusive=True)
            except (FileNotFoundError, BlockingIOError):
                continue  # gone, or its process is at work
            with Hold([descriptor]):
                shutil.rmtree(path)
