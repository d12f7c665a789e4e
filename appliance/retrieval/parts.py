"""What files and stores need of the other parts of this room, as far as they need it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import UnavailableError
from appliance.core.retrieval import Chunking, SearchRequest, SearchResult
from appliance.retrieval.parsing.document import ParsedDocument

Ids: TypeAlias = NDArray[np.int64]
Vectors: TypeAlias = NDArray[np.float32]
Count = Callable[[Sequence[str]], Sequence[int]]
"""Tokens of each text."""


class ParserDownError(UnavailableError):
    """The parser cannot be started. It may pass, so a file is tried again, and yet not for ever."""


class Parser(Protocol):
    """Takes text from files."""

    async def parse(self, path: Path, filename: str, media_type: str) -> ParsedDocument:
        """Return a file's text.

        Raises:
            InvalidRequestError: `unsupported_file` or `invalid_file`.
            ParserDownError: It cannot be started.
        """
        ...


class Piece(Protocol):
    """A chunk of a document before it has an id."""

    @property
    def text(self) -> str:
        """Return the text."""
        ...

    @property
    def start(self) -> int:
        """Return where it begins in the document's text, in characters."""
        ...

    @property
    def end(self) -> int:
        """Return where it ends."""
        ...

    @property
    def page(self) -> int | None:
        """Return the page, from 1, or None."""
        ...

    @property
    def heading(self) -> tuple[str, ...]:
        """Return the headings above it, outermost first."""
        ...

    @property
    def tokens(self) -> int:
        """Return how many tokens of the embedder it has."""
        ...


Cut = Callable[[ParsedDocument, Chunking, Count], Sequence[Piece]]
"""Cuts a document into chunks."""


class TokenCounter(Protocol):
    """Counts in an embedder's own tokens."""

    async def count_tokens(self, model: str, texts: Sequence[str]) -> Sequence[int]:
        """Return the tokens of each text. Raises as `EmbeddingModels.embed` does."""
        ...

    async def longest_input(self, model: str) -> int:
        """Return how many tokens of a text it embeds. Raises as `EmbeddingModels.embed` does."""
        ...


class Keywords(Protocol):
    """The keyword index, as far as it is written to and checked."""

    def chunk_ids(self, store: int | None = None) -> Ids:
        """Return the ids that are there, of one store or of all, ascending."""
        ...

    def verify(self) -> list[str]:
        """Return what is wrong with its files."""
        ...

    def rebuild(self, rows: Iterable[tuple[int, int, str]]) -> None:
        """Make it anew from stores, chunk ids and texts."""
        ...

    def add(self, store: int, rows: Sequence[tuple[int, str]]) -> None:
        """Take in chunk ids and texts."""
        ...

    def remove(self, chunk_ids: Sequence[int]) -> None:
        """Find these chunks no more; those that are not there do not matter."""
        ...

    def erase(self) -> None:
        """See to it that no file of the index has a byte of what was removed."""
        ...


class VectorIndexes(Protocol):
    """The vector indexes, as far as they are written to."""

    def add(self, store: int, ids: Ids, vectors: Vectors) -> None:
        """Take in what the truth has already."""
        ...

    def remove(self, store: int, ids: Ids) -> None:
        """Find these chunks no more; those that are not there do not matter."""
        ...

    def drop(self, store: int) -> None:
        """Delete a store's index."""
        ...

    def rebuild(self, store: int) -> None:
        """Make a store's index anew from the truth."""
        ...

    def verify(self, store: int) -> list[str]:
        """Return what is wrong with a store's index."""
        ...

    def erase(self, store: int) -> None:
        """See to it that no file of a store's index has anything of what was removed."""
        ...


@dataclass(frozen=True, slots=True)
class Turns:
    """Locks: whoever adds to an index or removes from it reads the truth while he holds its lock.

    So what is removed while it is added is removed from the index behind that.
    """

    keywords: asyncio.Lock = field(default_factory=asyncio.Lock)
    vectors: asyncio.Lock = field(default_factory=asyncio.Lock)


class Searcher(Protocol):
    """Searches a store that is there and is the tenant's."""

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return passages; see `core.retrieval.VectorStores.search`."""
        ...
