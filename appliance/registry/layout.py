"""A model's files side by side in a folder, as engines and tokenizers look for them.

    onnx/<digest over roles and hashes>/model.onnx            the file of the role `model`
    onnx/<digest over roles and hashes>/1_Pooling/config.json  any other, under its role

The files are hard links to the blobs, so they take no room, or copies where the file system has no such links. A
folder gets its name when it is whole; whatever has another name is garbage. The folder of all of them is locked while
one is made or removed, so that two processes do not get in each other's way.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from appliance.core.errors import ConflictError
from appliance.registry.files import storage_errors, sync_folder
from appliance.registry.known import ModelFile, RegisteredModel
from appliance.registry.roles import GRAPH_NAME, MODEL, check_path_roles
from appliance.store.locks import Hold, lock

_WAIT_S = 60.0
_UNFINISHED = "unfinished-"
_CANNOT_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})


def lay_out(model: RegisteredModel, folder: Path) -> Path:
    """Return the folder that holds the model's files, made now unless it is there and whole.

    Args:
        model: The caller holds its files (`Registry.hold`).
        folder: Where the folders of all models are; it is made if need be.

    Raises:
        ModelFileError: A role of the model is no path inside a folder.
        StorageError: The disk is full or failed; nothing half made has the folder's name.
        ConflictError: Another process has been making or removing a folder for a minute.
    """
    wanted = _paths(model)
    target = folder / layout_name(model)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), storage_errors(target):
        if not _is_whole(target, wanted):
            _remove(target)
            unfinished = folder / f"{_UNFINISHED}{target.name}"
            _remove(unfinished)
            _fill(unfinished, wanted)
            unfinished.rename(target)
            sync_folder(folder)
    return target


def layout_name(model: RegisteredModel) -> str:
    """Return the folder's name: a digest over the roles and hashes of all files."""
    return hashlib.sha256(msgspec.json.encode(sorted(model.digests.items()))).hexdigest()


def remove_stale_layouts(folder: Path, models: Collection[RegisteredModel]) -> None:
    """Delete the folders of all but these models: their links would keep the room of removed files taken.

    Raises:
        StorageError: The disk failed.
        ConflictError: As `lay_out`.
    """
    if not folder.is_dir():
        return
    kept = {layout_name(model) for model in models}
    with _locked(folder), storage_errors(folder):
        for path in sorted(folder.iterdir()):
            if path.name not in kept:
                _remove(path)


def _paths(model: RegisteredModel) -> Mapping[str, ModelFile]:
    check_path_roles([each.role for each in model.files if each.role != MODEL])
    return {GRAPH_NAME if each.role == MODEL else each.role: each for each in model.files}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with storage_errors(folder):
        try:
            descriptor = lock(folder, os.O_RDONLY, exclusive=True, wait_s=_WAIT_S)
        except BlockingIOError as error:
            raise ConflictError(f"Another process is busy with {folder}.", advice="Try again.") from error
    with Hold([descriptor]):
        yield


def _is_whole(target: Path, wanted: Mapping[str, ModelFile]) -> bool:
    """Tell whether the folder holds these files in full size and no other; their content was checked when they came."""
    if target.is_symlink() or not target.is_dir():
        return False
    found = {
        str(path.relative_to(target)): path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    return found.keys() == wanted.keys() and all(
        not path.is_symlink() and path.is_file() and path.stat().st_size == wanted[name].size
        for name, path in found.items()
    )


def _fill(folder: Path, wanted: Mapping[str, ModelFile]) -> None:
    for name, file in wanted.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.path, path)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            _copy(file.path, path)
    for inner in sorted({folder, *((folder / name).parent for name in wanted)}):
        sync_folder(inner)


def _copy(source: Path, path: Path) -> None:
    with source.open("rb") as content, path.open("xb") as copy:
        shutil.copyfileobj(content, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
