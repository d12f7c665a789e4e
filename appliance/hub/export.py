"""The signed repository and model files in a folder, such as a memory stick, for boxes that never see the hub.

    metadata/…  targets/…   as devices ask the hub for them
    sha256-<hex>            model files

A device believes nothing of it but what is signed, so the stick may pass through any hands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from appliance.hub.authority import Authority
from appliance.hub.release_blobs import ReleaseBlobs
from appliance.hub.release_records import SignedRelease
from appliance.security.metadata import METADATA
from appliance.store.files import CHUNK_BYTES, Progress, no_progress, open_regular, storage_errors, sync_folder


def export_releases(
    authority: Authority,
    blobs: ReleaseBlobs,
    releases: Sequence[SignedRelease],
    folder: Path,
    progress: Progress = no_progress,
) -> int:
    """Write a copy; what is in the folder already is kept, and metadata comes last, so a stick may be pulled out.

    Args:
        authority: Of the repository; no key is needed.
        blobs: The hub's model files.
        releases: Whose model files are wanted.
        folder: Made if need be.
        progress: Told of each model file.

    Returns:
        The bytes of the model files that were written.

    Raises:
        NotFoundError: A model file is missing on the hub.
        StorageError: The folder is full, or failed.
    """
    metadata = authority.repository.metadata()
    written = 0
    for digest, length in sorted({(file.digest, file.length) for each in releases for file in each.release.files}):
        written += _copy(blobs.path(digest), folder / f"sha256-{digest}", length, progress)
    for target in authority.targets().values():
        _write(folder / target.stored, _filling(authority.read_target(target)))
    for name in sorted(metadata, key=lambda each: each == "timestamp.json"):
        _write(folder / METADATA / name, _filling(metadata[name]))
    return written


def _filling(data: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(data)


def _copy(source: Path, target: Path, length: int, progress: Progress) -> int:
    with storage_errors(target):
        if target.is_file() and target.stat().st_size == length:
            return 0
    done = 0
    with storage_errors(source), open_regular(source) as original:

        def fill(file: BinaryIO) -> None:
            nonlocal done
            while chunk := original.read(CHUNK_BYTES):
                done += file.write(chunk)
                progress(f"writing {target.name:.19}", done, length)

        _write(target, fill)
    return done


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all; unlike `write_durably` it sets no rights, for sticks often have none."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
