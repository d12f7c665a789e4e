"""Files and vector stores in memory: the promises of the real ones, kept without a disk, an index or a model.

A file is one chunk, its text; it is taken in when it is next looked at, unless the test holds it. A search finds the
files that have any of the query's words.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from appliance.core.errors import InvalidRequestError, NotFoundError, TooLargeError
from appliance.core.retrieval import (
    AttributeValue,
    Comparison,
    Explanation,
    FileBatch,
    FileCounts,
    Filter,
    Hit,
    NewStoreFile,
    Reembedding,
    SearchRequest,
    SearchResult,
    StoreChange,
    StoredFile,
    StoreFile,
    UploadTerms,
    VectorStore,
)

CREATED = 1_800_000_000

EntryT = TypeVar("EntryT", StoredFile, VectorStore, StoreFile)


def page(entries: Iterable[EntryT], limit: int, after: str, newest_first: bool) -> tuple[Sequence[EntryT], bool]:
    """Return a page of entries that come oldest first."""
    ordered = list(entries)[:: -1 if newest_first else 1]
    if after:
        places = [index for index, each in enumerate(ordered) if each.id == after]
        if not places:
            raise NotFoundError(f"There is no {after!r}.", param="after")
        ordered = ordered[places[0] + 1 :]
    return ordered[:limit], len(ordered) > limit


class ScriptedFiles:
    """Uploaded files in memory.

    Attributes:
        broken: How many uploads did not come whole.
        received: Bytes of the upload that comes.
    """

    def __init__(self, most_bytes: int = 1024 * 1024) -> None:
        self.broken = 0
        self.received = 0
        self.contents: dict[str, bytes] = {}
        self.stores: ScriptedStores | None = None
        self._files: dict[str, tuple[str, StoredFile]] = {}
        self._most_bytes = most_bytes

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
        whole, self.received = bytearray(), 0
        try:
            async for piece in content:
                whole += piece
                self.received = len(whole)
                if len(whole) > self._most_bytes:
                    raise TooLargeError("It is too large.", code="file_too_large")  # noqa: TRY301
            said = UploadTerms(purpose, expires_after_s) if terms is None else terms()
        except BaseException:
            self.broken += 1
            raise
        if not whole or not filename:
            raise InvalidRequestError("The file is empty.", param="file", code="empty_file")
        expires = None if said.expires_after_s is None else CREATED + said.expires_after_s
        name = f"file-{secrets.token_hex(12)}"
        stored = StoredFile(name, filename, said.purpose, len(whole), "text/plain", CREATED, expires)
        self._files[name] = (tenant, stored)
        self.contents[name] = bytes(whole)
        return stored

    def list(
        self, *, tenant: str, purpose: str = "", limit: int = 10_000, after: str = "", newest_first: bool = True
    ) -> tuple[Sequence[StoredFile], bool]:
        mine = [each for owner, each in self._files.values() if owner == tenant and purpose in ("", each.purpose)]
        return page(mine, limit, after, newest_first)

    def get(self, file: str, *, tenant: str) -> StoredFile:
        owner, stored = self._files.get(file, ("", None))
        if stored is None or owner != tenant:
            raise NotFoundError(f"There is no file {file!r}.")
        return stored

    async def content(self, file: str, *, tenant: str) -> AsyncIterator[bytes]:
        whole = self.contents[self.get(file, tenant=tenant).id]
        for start in range(0, len(whole), 1000):
            yield whole[start : start + 1000]

    async def delete(self, file: str, *, tenant: str) -> None:
        self.get(file, tenant=tenant)
        del self._files[file], self.contents[file]
        if self.stores is not None:
            self.stores.forget(file)


@dataclass(slots=True)
class _Store:
    tenant: str
    store: VectorStore
    files: dict[str, StoreFile] = field(default_factory=dict)
    batches: dict[str, bool] = field(default_factory=dict)


class ScriptedStores:
    """Vector stores in memory.

    Attributes:
        held: Whether files stay `in_progress`.
        searches: What was looked for.
        problems: What the next verification finds.
        rebuilt: The stores that were.
        reembedded: The stores that were asked to be.
        failures: Raised instead by the next calls of `add`, one each.
    """

    def __init__(self, files: ScriptedFiles) -> None:
        self.held = False
        self.searches: list[SearchRequest] = []
        self.problems: list[str] = []
        self.rebuilt: list[str] = []
        self.reembedded: list[str] = []
        self.failures: list[Exception] = []
        self._files = files
        self._stores: dict[str, _Store] = {}
        self._ids = itertools.count(1)
        files.stores = self

    def forget(self, file: str) -> None:
        for each in self._stores.values():
            each.files.pop(file, None)

    def create(
        self,
        *,
        tenant: str,
        name: str = "",
        description: str = "",
        metadata: Mapping[str, str] | None = None,
        expires_after_days: int | None = None,
    ) -> VectorStore:
        store = VectorStore(
            f"vs_{next(self._ids):024}", name, description, CREATED, CREATED, 0, FileCounts(), metadata or {}
        )
        self._stores[store.id] = _Store(tenant, _aged(store, expires_after_days))
        return self.get(store.id, tenant=tenant)

    def list(self, *, tenant: str, limit: int, after: str, newest_first: bool) -> tuple[Sequence[VectorStore], bool]:
        mine = [self.get(name, tenant=tenant) for name, each in self._stores.items() if each.tenant == tenant]
        return page(mine, limit, after, newest_first)

    def get(self, store: str, *, tenant: str) -> VectorStore:
        found = self._of(store, tenant)
        usage = sum(each.usage for each in found.files.values())
        return replace(found.store, counts=_counts(found.files.values()), usage=usage)

    def _of(self, store: str, tenant: str | None) -> _Store:
        found = self._stores.get(store)
        if found is None or tenant not in (None, found.tenant):
            raise NotFoundError(f"There is no vector store {store!r}.")
        if not self.held:
            for name, each in found.files.items():
                if each.status == "in_progress":
                    found.files[name] = replace(each, status="completed", chunks=1, embedded=1)
        return found

    def change(self, store: str, change: StoreChange, *, tenant: str) -> VectorStore:
        found = self._of(store, tenant)
        now = found.store
        found.store = _aged(
            replace(
                now,
                name=now.name if change.name is None else change.name,
                description=now.description if change.description is None else change.description,
                metadata=now.metadata if change.metadata is None else change.metadata,
            ),
            now.expires_after_days if change.expires_after_days is None else change.expires_after_days,
        )
        return self.get(store, tenant=tenant)

    async def delete(self, store: str, *, tenant: str) -> None:
        self._of(store, tenant)
        del self._stores[store]

    def add(
        self, store: str, files: Sequence[NewStoreFile], *, tenant: str, batch: bool
    ) -> tuple[str, Sequence[StoreFile]]:
        found = self._of(store, tenant)
        if self.failures:
            raise self.failures.pop(0)
        sizes = [self._files.get(each.file, tenant=tenant).size for each in files]
        name = f"vsfb_{next(self._ids):024}" if batch else ""
        if batch:
            found.batches[name] = False
        added = [
            StoreFile(each.file, store, CREATED, "in_progress", size, each.chunking, each.attributes, name)
            for each, size in zip(files, sizes, strict=True)
        ]
        found.files.update({each.id: each for each in added})
        return name, added

    def list_files(
        self, store: str, *, tenant: str, batch: str, status: str, limit: int, after: str, newest_first: bool
    ) -> tuple[Sequence[StoreFile], bool]:
        found = self._of(store, tenant)
        if batch:
            self.get_batch(store, batch, tenant=tenant)
        mine = [each for each in found.files.values() if batch in ("", each.batch) and status in ("", each.status)]
        return page(mine, limit, after, newest_first)

    def get_file(self, store: str, file: str, *, tenant: str) -> StoreFile:
        found = self._of(store, tenant).files.get(file)
        if found is None:
            raise NotFoundError(f"There is no file {file!r} in the vector store.")
        return found

    def change_file(self, store: str, file: str, attributes: Mapping[str, AttributeValue], *, tenant: str) -> StoreFile:
        changed = replace(self.get_file(store, file, tenant=tenant), attributes=attributes)
        self._stores[store].files[file] = changed
        return changed

    async def remove_file(self, store: str, file: str, *, tenant: str) -> None:
        self.get_file(store, file, tenant=tenant)
        del self._stores[store].files[file]

    def file_text(self, store: str, file: str, *, tenant: str) -> Sequence[str]:
        self.get_file(store, file, tenant=tenant)
        return [self._files.contents[file].decode(errors="replace")]

    def get_batch(self, store: str, batch: str, *, tenant: str) -> FileBatch:
        found = self._of(store, tenant)
        if batch not in found.batches:
            raise NotFoundError(f"There is no file batch {batch!r}.")
        counts = _counts(each for each in found.files.values() if each.batch == batch)
        if found.batches[batch]:
            return FileBatch(batch, store, CREATED, "cancelled", counts)
        return FileBatch(batch, store, CREATED, "in_progress" if counts.in_progress else "completed", counts)

    def cancel_batch(self, store: str, batch: str, *, tenant: str) -> FileBatch:
        self.get_batch(store, batch, tenant=tenant)
        found = self._stores[store]
        stopped = {
            name: replace(each, status="cancelled")
            for name, each in found.files.items()
            if each.batch == batch and each.status == "in_progress"
        }
        found.files.update(stopped)
        found.batches[batch] = found.batches[batch] or bool(stopped)
        return self.get_batch(store, batch, tenant=tenant)

    async def search(self, request: SearchRequest) -> SearchResult:
        found = self._of(request.store, request.tenant)
        self.searches.append(request)
        words = {word for query in request.queries for word in query.lower().split()}
        hits = []
        for each in found.files.values():
            text = self._files.contents[each.id].decode(errors="replace")
            score = len(words & set(text.lower().split())) / max(len(words), 1)
            if score > 0 and score >= request.threshold and _passes(each.attributes, request.filters):
                hits.append(self._hit(each, text, score, request))
        hits.sort(key=lambda hit: -hit.score)
        end = request.after + request.limit
        return SearchResult(hits[request.after : end], len(hits) > end, ["keyword", "semantic"])

    def _hit(self, file: StoreFile, text: str, score: float, request: SearchRequest) -> Hit:
        explanation = Explanation(1, 2.5, None, None, score) if request.explain else None
        filename = self._files.get(file.id, tenant=request.tenant).filename
        place = (0, len(text), 3, ("Manual", "Filter"))
        return Hit(file.id, filename, score, text, *place, file.attributes, explanation)

    async def rebuild(self, store: str, *, tenant: str | None) -> VectorStore:
        self.rebuilt.append(store)
        return self._of(store, tenant).store

    async def reembed(self, store: str, *, tenant: str) -> VectorStore:
        begun = replace(self._of(store, tenant).store, reembedding=Reembedding("", 0, 4))
        self.reembedded.append(store)
        return begun

    async def verify(self, store: str, *, tenant: str | None) -> Sequence[str]:
        self._of(store, tenant)
        return self.problems


def _aged(store: VectorStore, days: int | None) -> VectorStore:
    if not days:
        return replace(store, expires_after_days=None, expires=None)
    return replace(store, expires_after_days=days, expires=CREATED + days * 86_400)


def _counts(files: Iterable[StoreFile]) -> FileCounts:
    found = [each.status for each in files]
    return FileCounts(
        found.count("in_progress"), found.count("completed"), found.count("failed"), found.count("cancelled")
    )


def _passes(attributes: Mapping[str, AttributeValue], wanted: Filter | None) -> bool:
    """Apply what the tests filter by: `eq`, and compounds."""
    if wanted is None:
        return True
    if isinstance(wanted, Comparison):
        return attributes.get(wanted.key) == wanted.value
    found = [_passes(attributes, each) for each in wanted.filters]
    return all(found) if wanted.type == "and" else any(found)
