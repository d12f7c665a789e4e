"""A file that is being read: its bytes within limits, and the archives that office files are."""

from __future__ import annotations

import zipfile
from pathlib import Path

from appliance.retrieval.parsing.decoding import decode
from appliance.retrieval.parsing.writer import InvalidError, too_long

BYTES_PER_CHARACTER = 4
LARGEST_UNPACKED = 512 * 2**20
"""Bytes of all the XML parts of an office file together, unpacked."""
MOST_PARTS = 50_000
_MARKUP = (".xml", ".rels")


def read_bytes(path: Path, max_characters: int) -> bytes:
    """Return a text file's bytes.

    Raises:
        InvalidError: More than the longest text can have.
    """
    limit = BYTES_PER_CHARACTER * max_characters
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise too_long(max_characters)
    return data


def read_text(path: Path, max_characters: int, declared: str = "") -> str:
    """Return a text file's text. Raises as `read_bytes`."""
    return decode(read_bytes(path, max_characters), declared)


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open an office file.

    Raises:
        InvalidError: It is damaged, or unpacks to too much.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError) as error:
        raise InvalidError(f"is damaged: {error}") from error
    parts = archive.infolist()
    if len(parts) > MOST_PARTS:
        raise InvalidError(f"has {len(parts)} parts; {MOST_PARTS} are allowed")
    unpacked = sum(each.file_size for each in parts if each.filename.endswith(_MARKUP))
    if unpacked > LARGEST_UNPACKED:  # zipfile never unpacks more of a part than is said here
        raise InvalidError(
            f"unpacks to {unpacked} bytes of XML; {LARGEST_UNPACKED} are allowed", "Split it into several files."
        )
    return archive
