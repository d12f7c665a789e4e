"""Files, vector stores and search over them, in the terms of OpenAI's API. Times are Unix seconds, sizes bytes.

What belongs to an API key is seen and changed by that key alone: every call names the tenant, "" on an open server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

AttributeValue = str | float | bool
"""What a file's attribute may be; integers are stored as they come."""

FileStatus = Literal["in_progress", "completed", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An uploaded file.

    Attributes:
        id: `file-` and 24 letters and digits.
        media_type: What its bytes were found to be, whatever its name says.
    """

    id: str
    filename: str
    purpose: str
    size: int
    media_type: str
    created: int
    expires: int | None = None


@dataclass(frozen=True, slots=True)
class UploadTerms:
    """What a file is uploaded for, and how many seconds it is kept; None is until it is deleted."""

    purpose: str
    expires_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Chunking:
    """How files are cut: tokens of the embedder of a chunk, and how many of them two neighbours share."""

    most_tokens: int = 320
    overlap_tokens: int = 40

    def within(self, longest: int) -> Chunking:
        """Return the same for an embedder that reads no more than so many tokens of a text, itself if that suffices."""
        if self.most_tokens <= longest:
            return self
        return Chunking(longest, self.overlap_tokens * longest // self.most_tokens)


@dataclass(frozen=True, slots=True)
class FileCounts:
    """Files of a store by status."""

    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class Reembedding:
    """A store's chunks get vectors of another model, "" until it has answered; `done` of `total` have them."""

    model: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class VectorStore:
    """A searchable set of files.

    Attributes:
        id: `vs_` and 24 letters and digits.
        model: The embedder's full `name:version`, fixed when the first file was embedded; "" until then.
        usage: Bytes of text and vectors.
        expires_after_days: Days after the last use until it is removed, or None.
        reembedding: How far it is with being embedded with another model, or None.
    """

    id: str
    name: str
    description: str
    created: int
    last_active: int
    usage: int
    counts: FileCounts
    metadata: Mapping[str, str]
    model: str = ""
    expires_after_days: int | None = None
    expires: int | None = None
    reembedding: Reembedding | None = None


@dataclass(frozen=True, slots=True)
class StoreFile:
    """A file in a store.

    Attributes:
        batch: Id of the file batch that it was added with, or "".
        error_code: OpenAI's `server_error`, `unsupported_file` or `invalid_file`, or "".
        error: What went wrong, for a person.
        chunks: So many are searchable by keyword.
        embedded: So many of them are searchable by meaning.
    """

    id: str
    store: str
    created: int
    status: FileStatus
    usage: int
    chunking: Chunking
    attributes: Mapping[str, AttributeValue]
    batch: str = ""
    error_code: str = ""
    error: str = ""
    chunks: int = 0
    embedded: int = 0


@dataclass(frozen=True, slots=True)
class FileBatch:
    """Files that were added to a store together."""

    id: str
    store: str
    created: int
    status: FileStatus
    counts: FileCounts


@dataclass(frozen=True, slots=True)
class Comparison:
    """A condition on one attribute; `value` is a list for `in` and `nin`."""

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]
    key: str
    value: AttributeValue | tuple[AttributeValue, ...]


@dataclass(frozen=True, slots=True)
class Compound:
    """Conditions of which all (`and`) or any (`or`) must hold."""

    type: Literal["and", "or"]
    filters: tuple[Comparison | Compound, ...]


Filter = Comparison | Compound


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A search of one store.

    Attributes:
        queries: One or several phrasings of one question; what is best by any counts.
        limit: Most hits, 1 to 50.
        after: Skip so many hits: the page before ended there.
        mode: Which legs search.
        rerank: Whether a reranker reads the best candidates; None is what the settings say.
        threshold: Least score of a hit, 0 to 1.
        most_tokens: Budget of all hits' texts together in tokens of the embedder, or None.
        explain: Say how each hit was found.
        deadline_s: Seconds from now after which the search is given up, or None.
    """

    store: str
    queries: Sequence[str]
    tenant: str = ""
    limit: int = 10
    after: int = 0
    filters: Filter | None = None
    mode: Literal["hybrid", "keyword", "semantic"] = "hybrid"
    rerank: bool | None = None
    threshold: float = 0.0
    most_tokens: int | None = None
    explain: bool = False
    deadline_s: float | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a hit was found: ranks from 1 in each leg, None where a leg did not find it, and what was made of them."""

    keyword_rank: int | None
    keyword_score: float | None
    semantic_rank: int | None
    semantic_score: float | None
    fused_score: float
    rerank_score: float | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found.

    Attributes:
        score: 0 to 1, comparable within one answer only.
        start: Where it begins in the text taken from the file, in characters; `end` is behind its last.
        page: From 1, or None where the format has none.
        heading: The headings above it, outermost first.
    """

    file: str
    filename: str
    score: float
    text: str
    start: int
    end: int
    page: int | None
    heading: tuple[str, ...]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The hits of a page, best first; `more` says whether there are any behind them."""

    hits: Sequence[Hit]
    more: bool
    legs: Sequence[Literal["keyword", "semantic", "rerank"]]
    """What took part: a leg that is not ready, or missed its deadline, is missing here."""


class Files(Protocol):
    """Uploaded files, as the doors see them."""

    async def create(
        self,
        filename: str,
        purpose: str,
        content: AsyncIterator[bytes],
        *,
        tenant: str,
        expires_after_s: int | None = None,
        terms: Callable[[], UploadTerms] | None = None,
    ) -> StoredFile:
        """Write a file to disk as it comes, and keep it; nothing is left of one that does not come whole.

        Args:
            filename: As its owner calls it.
            purpose: What it is for.
            content: Its bytes; what this raises is raised.
            tenant: Whose it is.
            expires_after_s: Seconds from now after which it is erased, or None.
            terms: Asked for purpose and expiry when the content has come, for forms that have them behind the file.

        Raises:
            TooLargeError: It is over the limit.
            InvalidRequestError: It is empty, or of a type that is not taken.
            StorageError: The disk is too full.
        """
        ...

    def list(
        self, *, tenant: str, purpose: str = "", limit: int = 10_000, after: str = "", newest_first: bool = True
    ) -> tuple[Sequence[StoredFile], bool]:
        """Return files, and whether there are more."""
        ...

    def get(self, file: str, *, tenant: str) -> StoredFile:
        """Return one file. Raises NotFoundError."""
        ...

    def content(self, file: str, *, tenant: str) -> AsyncIterator[bytes]:
        """Read a file. Raises NotFoundError."""
        ...

    async def delete(self, file: str, *, tenant: str) -> None:
        """Erase a file and all that was made of it, in every store. Raises NotFoundError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChange:
    """New values for a store; None leaves one as it is. 0 days are no expiry."""

    name: str | None = None
    description: str | None = None
    metadata: Mapping[str, str] | None = None
    expires_after_days: int | None = None


@dataclass(frozen=True, slots=True)
class NewStoreFile:
    """A file that is to be in a store."""

    file: str
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    chunking: Chunking = Chunking()


class VectorStores(Protocol):
    """Vector stores, as the doors see them. Every method raises NotFoundError for what the tenant does not have."""

    def create(
        self,
        *,
        tenant: str,
        name: str = "",
        description: str = "",
        metadata: Mapping[str, str] | None = None,
        expires_after_days: int | None = None,
    ) -> VectorStore:
        """Make an empty store."""
        ...

    def list(self, *, tenant: str, limit: int, after: str, newest_first: bool) -> tuple[Sequence[VectorStore], bool]:
        """Return stores, and whether there are more."""
        ...

    def get(self, store: str, *, tenant: str) -> VectorStore:
        """Return one store."""
        ...

    def change(self, store: str, change: StoreChange, *, tenant: str) -> VectorStore:
        """Change what is said of a store."""
        ...

    async def delete(self, store: str, *, tenant: str) -> None:
        """Erase a store; its files stay where they were uploaded. Nothing is found in it once this returns."""
        ...

    def add(
        self, store: str, files: Sequence[NewStoreFile], *, tenant: str, batch: bool
    ) -> tuple[str, Sequence[StoreFile]]:
        """Queue files to be taken in; one that is there already is taken in anew if it is to be cut otherwise.

        Returns:
            The id of their batch, or "", and the files, in progress.
        """
        ...

    def list_files(
        self, store: str, *, tenant: str, batch: str, status: str, limit: int, after: str, newest_first: bool
    ) -> tuple[Sequence[StoreFile], bool]:
        """Return files of a store or of one of its batches, and whether there are more."""
        ...

    def get_file(self, store: str, file: str, *, tenant: str) -> StoreFile:
        """Return one file of a store."""
        ...

    def change_file(self, store: str, file: str, attributes: Mapping[str, AttributeValue], *, tenant: str) -> StoreFile:
        """Replace a file's attributes; searches see them at once."""
        ...

    async def remove_file(self, store: str, file: str, *, tenant: str) -> None:
        """Erase what was made of a file in a store; the uploaded file stays."""
        ...

    def file_text(self, store: str, file: str, *, tenant: str) -> Sequence[str]:
        """Return the text that was taken from a file, chunk by chunk."""
        ...

    def get_batch(self, store: str, batch: str, *, tenant: str) -> FileBatch:
        """Return one batch."""
        ...

    def cancel_batch(self, store: str, batch: str, *, tenant: str) -> FileBatch:
        """Stop taking in the files of a batch that are not through; what is searchable stays."""
        ...

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return passages, best first; nothing relevant is an empty list.

        Raises:
            InvalidRequestError: A filter or a limit will not do.
            DeadlineExceededError: It took longer than `deadline_s`.
        """
        ...

    async def rebuild(self, store: str, *, tenant: str | None) -> VectorStore:
        """Make a store's indexes anew from what is stored; searches go on meanwhile. None is any tenant's."""
        ...

    async def reembed(self, store: str, *, tenant: str) -> VectorStore:
        """Have a store embedded with the model that the settings name now; the old vectors answer until all are new.

        What was begun with that model is gone on with. Raises as `EmbeddingModels.embed` if there is no such model.
        """
        ...

    async def verify(self, store: str, *, tenant: str | None) -> Sequence[str]:
        """Return what is wrong with a store's indexes, one sentence each; nothing is the rule. None is any tenant's."""
        ...
