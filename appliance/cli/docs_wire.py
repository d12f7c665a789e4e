"""What `appliance docs` and a server say to each other of files and vector stores."""

from __future__ import annotations

import msgspec

Attribute = str | bool | int | float


class FileCounts(msgspec.Struct, frozen=True):
    """Files of a store by status."""

    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    total: int = 0


class Reembedding(msgspec.Struct, frozen=True):
    """How far a store is with being embedded with another model."""

    model: str = ""
    done: int = 0
    total: int = 0


class Store(msgspec.Struct, frozen=True):
    """A vector store."""

    id: str
    name: str
    file_counts: FileCounts = FileCounts()
    usage_bytes: int = 0
    model: str = ""
    reembedding: Reembedding | None = None


class StorePage(msgspec.Struct, frozen=True):
    """A page of vector stores."""

    data: list[Store]
    has_more: bool = False


class Uploaded(msgspec.Struct, frozen=True):
    """An uploaded file."""

    id: str
    filename: str
    bytes: int


class UploadedPage(msgspec.Struct, frozen=True):
    """A page of uploaded files."""

    data: list[Uploaded]
    has_more: bool = False


class Problem(msgspec.Struct, frozen=True):
    """Why a file could not be taken in."""

    message: str


class StoreFile(msgspec.Struct, frozen=True):
    """A file in a store."""

    id: str
    status: str
    usage_bytes: int = 0
    attributes: dict[str, Attribute] | None = None
    last_error: Problem | None = None
    chunks: int = 0
    embedded: int = 0


class StoreFilePage(msgspec.Struct, frozen=True):
    """A page of files in a store."""

    data: list[StoreFile]
    has_more: bool = False


class Part(msgspec.Struct, frozen=True):
    """A piece of a passage."""

    text: str = ""


class Passage(msgspec.Struct, frozen=True):
    """A passage that was found."""

    file_id: str
    filename: str
    score: float
    content: list[Part]
    page: int | None = None
    heading: list[str] = []
    start: int = 0
    end: int = 0
    attributes: dict[str, Attribute] | None = None


class Passages(msgspec.Struct, frozen=True):
    """The answer to a search."""

    data: list[Passage]
    legs: list[str] = []


class Verification(msgspec.Struct, frozen=True):
    """What is wrong with a store's indexes."""

    valid: bool
    problems: list[str]
