"""Vector stores and what is in them. See `core.retrieval.VectorStores`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError
from appliance.core.retrieval import (
    AttributeValue,
    FileBatch,
    NewStoreFile,
    SearchRequest,
    SearchResult,
    StoreChange,
    StoreFile,
    VectorStore,
)
from appliance.retrieval.erasure import Erasure
from appliance.retrieval.parts import Searcher, TokenCounter
from appliance.retrieval.reembedding import ask
from appliance.retrieval.rows import (
    SELECT_STORE_FILE,
    attributes_text,
    counts,
    to_store,
    to_store_file,
)
from appliance.retrieval.upkeep import Upkeep
from appliance.store.database import Connection, Database, Row
from appliance.store.rows import new_id, one, page

ACTIVE_EVERY_S = 60
"""A use is noted when the last one noted is older than this: searches write nothing as a rule."""

_VALID = "(expires_after_days IS NULL OR last_active + expires_after_days * 86400 > :now)"


class Stores:
    """The vector stores of `retrieval.db`."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        erasure: Erasure,
        *,
        searcher: Searcher,
        upkeep: Upkeep,
        counter: TokenCounter,
        embedder: str,
        on_work: Callable[[], object],
    ) -> None:
        """Keep stores in the database.

        Args:
            database: `retrieval.db`.
            clock: For ages.
            erasure: Erases what is removed.
            searcher: Searches.
            upkeep: Checks and remakes indexes.
            counter: Knows which embedders there are.
            embedder: The model that embeds new stores, as `name` or `name:version`.
            on_work: Called when there is something to take in.
        """
        self._database = database
        self._clock = clock
        self._erasure = erasure
        self._searcher = searcher
        self._upkeep = upkeep
        self._counter = counter
        self._embedder = embedder
        self._on_work = on_work

    # Stores

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
        now = int(self._clock.unix())
        row = (new_id("vs_"), tenant, name, description, _json(metadata or {}), now, now, expires_after_days or None)

        def write(connection: Connection) -> VectorStore:
            sql = """
                INSERT INTO stores (id, tenant, name, description, metadata, created, last_active, expires_after_days)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING *
            """
            return to_store(connection, connection.execute(sql, row).fetchone())

        return self._database.write_blocking(write)

    def list(self, *, tenant: str, limit: int, after: str, newest_first: bool) -> tuple[Sequence[VectorStore], bool]:
        """Return stores, and whether there are more."""

        def read(connection: Connection) -> tuple[Sequence[VectorStore], bool]:
            key = self._store(connection, after, tenant)["key"] if after else None
            values = {"tenant": tenant, "now": self._clock.unix(), "after": key}
            sql = f"SELECT * FROM stores WHERE tenant = :tenant AND {_VALID}"  # noqa: S608
            rows, more = page(connection, sql, values, limit=limit, newest_first=newest_first, key="key")
            return [to_store(connection, each) for each in rows], more

        return self._database.read(read)

    def get(self, store: str, *, tenant: str) -> VectorStore:
        """Return one store."""
        return self._database.read(lambda each: to_store(each, self._store(each, store, tenant)))

    def _store(self, connection: Connection, store: str, tenant: str | None) -> Row:
        """Return a store of a tenant, or of any for None. Raises NotFoundError."""
        sql = f"SELECT * FROM stores WHERE id = :id AND tenant = coalesce(:tenant, tenant) AND {_VALID}"  # noqa: S608
        values = {"id": store, "tenant": tenant, "now": self._clock.unix()}
        return one(connection, sql, values, f"vector store {store!r}")

    def change(self, store: str, change: StoreChange, *, tenant: str) -> VectorStore:
        """Change what is said of a store."""
        values: dict[str, Any] = {
            "name": change.name,
            "description": change.description,
            "metadata": None if change.metadata is None else _json(change.metadata),
            "days": change.expires_after_days,
        }
        sql = """
            UPDATE stores SET
                name = coalesce(:name, name), description = coalesce(:description, description),
                metadata = coalesce(:metadata, metadata),
                expires_after_days = CASE WHEN :days IS NULL THEN expires_after_days ELSE nullif(:days, 0) END
            WHERE key = :key RETURNING *
        """

        def write(connection: Connection) -> VectorStore:
            key = self._store(connection, store, tenant)["key"]
            return to_store(connection, connection.execute(sql, {**values, "key": key}).fetchone())

        return self._database.write_blocking(write)

    async def delete(self, store: str, *, tenant: str) -> None:
        """Erase a store; see `core.retrieval.VectorStores.delete`."""
        await self._erasure.erase(
            lambda each: self._erasure.remove_store(each, self._store(each, store, tenant)["key"])
        )

    def remove_expired(self, connection: Connection) -> int:
        """Take out what is past its time, in the caller's transaction, and return how many there were."""
        sql = f"SELECT key FROM stores WHERE NOT {_VALID} LIMIT 1000"  # noqa: S608
        keys = [int(key) for (key,) in connection.execute(sql, {"now": self._clock.unix()}).fetchall()]
        for key in keys:
            self._erasure.remove_store(connection, key)
        return len(keys)

    # Files of a store

    def add(
        self, store: str, files: Sequence[NewStoreFile], *, tenant: str, batch: bool
    ) -> tuple[str, Sequence[StoreFile]]:
        """Queue files to be taken in; see `core.retrieval.VectorStores.add`.

        Raises:
            ConflictError: The store was embedded with another model than files are embedded with now.
        """
        now = int(self._clock.unix())
        wanted = {each.file: (each, attributes_text(each.attributes)) for each in files}
        name = new_id("vsfb_") if batch else ""

        def write(connection: Connection) -> Sequence[StoreFile]:
            row = self._store(connection, store, tenant)
            self._check_embedder(row)
            if batch:
                connection.execute("INSERT INTO batches (id, store, created) VALUES (?, ?, ?)", (name, row["key"], now))
            keys = [
                self._add_one(connection, row, each, attributes, batch=name, now=now)
                for each, attributes in wanted.values()
            ]
            connection.execute("UPDATE stores SET last_active = max(last_active, ?) WHERE key = ?", (now, row["key"]))
            sql = f"{SELECT_STORE_FILE} WHERE store_files.key = ?"
            return [to_store_file(connection.execute(sql, (key,)).fetchone()) for key in keys]

        added = self._database.write_blocking(write)
        self._on_work()
        return name, added

    def _check_embedder(self, store: Row) -> None:
        model = str(store["model"] if store["next_model"] is None else store["next_model"])
        if model and self._embedder not in (model, model.partition(":")[0]):
            raise ConflictError(
                f"The store {store['id']} was embedded with {model} ({store['dimensions']} numbers a vector); "
                f"files are embedded with {self._embedder} now, and their vectors do not compare.",
                advice=f"Embed the store again, `appliance docs reembed`, or set `embedding_model` back to {model}.",
                code="embedder_changed",
            )

    def _add_one(
        self, connection: Connection, store: Row, new: NewStoreFile, attributes: str, *, batch: str, now: int
    ) -> int:
        """Insert or renew one file of a store and return its key."""
        sql = "SELECT key FROM files WHERE id = ? AND tenant = ? AND (expires IS NULL OR expires > ?)"
        file = one(connection, sql, (new.file, store["tenant"], self._clock.unix()), f"file {new.file!r}")["key"]
        chunking = (new.chunking.most_tokens, new.chunking.overlap_tokens)
        old = connection.execute(
            "SELECT * FROM store_files WHERE store = ? AND file = ?", (store["key"], file)
        ).fetchone()
        if old is not None:
            same = chunking == (old["most_tokens"], old["overlap_tokens"])
            if same and old["status"] in ("in_progress", "completed"):
                update = "UPDATE store_files SET attributes = ?, batch = ? WHERE key = ?"
                connection.execute(update, (attributes, batch, old["key"]))
                return int(old["key"])
            self._erasure.remove_store_files(connection, "key", old["key"])
            self._erasure.wake()
        insert = """
            INSERT INTO store_files
                (store, file, created, status, stage, attributes, most_tokens, overlap_tokens, batch)
            VALUES (?, ?, ?, 'in_progress', 'queued', ?, ?, ?, ?) RETURNING key
        """
        return int(connection.execute(insert, (store["key"], file, now, attributes, *chunking, batch)).fetchone()[0])

    def list_files(
        self, store: str, *, tenant: str, batch: str, status: str, limit: int, after: str, newest_first: bool
    ) -> tuple[Sequence[StoreFile], bool]:
        """Return files of a store or of one of its batches, and whether there are more."""

        def read(connection: Connection) -> tuple[Sequence[StoreFile], bool]:
            row = self._store(connection, store, tenant)
            if batch:
                self._batch(connection, row["key"], batch)
            values = {
                "store": row["key"],
                "batch": batch,
                "status": status,
                "after": self._file(connection, store, after, tenant)["key"] if after else None,
            }
            sql = f"{SELECT_STORE_FILE} WHERE store_files.store = :store"
            sql += " AND store_files.batch = :batch" if batch else ""
            sql += " AND store_files.status = :status" if status else ""
            rows, more = page(connection, sql, values, limit=limit, newest_first=newest_first, key="store_files.key")
            return [to_store_file(each) for each in rows], more

        return self._database.read(read)

    def _file(self, connection: Connection, store: str, file: str, tenant: str) -> Row:
        row = self._store(connection, store, tenant)
        sql = f"{SELECT_STORE_FILE} WHERE store_files.store = ? AND files.id = ?"
        return one(connection, sql, (row["key"], file), f"file {file!r} in the vector store {store}")

    def get_file(self, store: str, file: str, *, tenant: str) -> StoreFile:
        """Return one file of a store."""
        return self._database.read(lambda each: to_store_file(self._file(each, store, file, tenant)))

    def change_file(self, store: str, file: str, attributes: Mapping[str, AttributeValue], *, tenant: str) -> StoreFile:
        """Replace a file's attributes; searches see them at once."""
        text = attributes_text(attributes)

        def write(connection: Connection) -> StoreFile:
            key = self._file(connection, store, file, tenant)["key"]
            connection.execute("UPDATE store_files SET attributes = ? WHERE key = ?", (text, key))
            return to_store_file(self._file(connection, store, file, tenant))

        return self._database.write_blocking(write)

    async def remove_file(self, store: str, file: str, *, tenant: str) -> None:
        """Erase what was made of a file in a store; the uploaded file stays."""

        def remove(connection: Connection) -> None:
            self._erasure.remove_store_files(connection, "key", self._file(connection, store, file, tenant)["key"])

        await self._erasure.erase(remove)

    def file_text(self, store: str, file: str, *, tenant: str) -> Sequence[str]:
        """Return the text that was taken from a file, chunk by chunk."""

        def read(connection: Connection) -> Sequence[str]:
            key = self._file(connection, store, file, tenant)["key"]
            sql = "SELECT text FROM chunks WHERE store_file = ? ORDER BY position"
            return [str(text) for (text,) in connection.execute(sql, (key,))]

        return self._database.read(read)

    # Batches

    def _batch(self, connection: Connection, store: int, batch: str) -> Row:
        sql = "SELECT * FROM batches WHERE id = ? AND store = ?"
        return one(connection, sql, (batch, store), f"file batch {batch!r} in this vector store")

    def get_batch(self, store: str, batch: str, *, tenant: str) -> FileBatch:
        """Return one batch."""
        return self._database.read(lambda each: self._read_batch(each, store, batch, tenant))

    def _read_batch(self, connection: Connection, store: str, batch: str, tenant: str) -> FileBatch:
        row = self._batch(connection, self._store(connection, store, tenant)["key"], batch)
        by_status = counts(connection, "batch = ?", batch)
        if row["cancelled"]:
            return FileBatch(batch, store, row["created"], "cancelled", by_status)
        status = "in_progress" if by_status.in_progress else "completed"
        return FileBatch(batch, store, row["created"], status, by_status)  # type: ignore[arg-type]

    def cancel_batch(self, store: str, batch: str, *, tenant: str) -> FileBatch:
        """Stop taking in the files of a batch that are not through; what is searchable stays."""
        sql = "UPDATE store_files SET status = 'cancelled' WHERE batch = ? AND status = 'in_progress'"

        def write(connection: Connection) -> FileBatch:
            row = self._batch(connection, self._store(connection, store, tenant)["key"], batch)
            stopped = connection.execute(sql, (batch,)).rowcount
            if stopped:
                connection.execute("UPDATE batches SET cancelled = 1 WHERE key = ?", (row["key"],))
            return self._read_batch(connection, store, batch, tenant)

        return self._database.write_blocking(write)

    # Searching

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return passages, best first, and note that the store was used; see `core.retrieval.VectorStores.search`."""
        row = self._database.read(lambda each: self._store(each, request.store, request.tenant))
        now = int(self._clock.unix())
        if now - row["last_active"] > ACTIVE_EVERY_S:
            sql = "UPDATE stores SET last_active = ? WHERE key = ?"
            await self._database.write(lambda each: each.execute(sql, (now, row["key"])).fetchall())
        return await self._searcher.search(request)

    # Upkeep

    async def rebuild(self, store: str, *, tenant: str | None) -> VectorStore:
        """Make a store's indexes anew from what is stored; searches go on meanwhile."""
        await self._upkeep.rebuild(self._key(store, tenant))
        return self._database.read(lambda each: to_store(each, self._store(each, store, tenant)))

    async def verify(self, store: str, *, tenant: str | None) -> Sequence[str]:
        """Return what is wrong with a store's indexes, one sentence each; nothing is the rule."""
        return await self._upkeep.verify(self._key(store, tenant))

    async def reembed(self, store: str, *, tenant: str) -> VectorStore:
        """Have a store embedded with another model; see `core.retrieval.VectorStores.reembed`."""
        self._key(store, tenant)
        await self._counter.count_tokens(self._embedder, ["."])  # whether there is such a model

        def write(connection: Connection) -> VectorStore:
            ask(connection, self._store(connection, store, tenant), self._embedder)
            return to_store(connection, self._store(connection, store, tenant))

        found = await self._database.write(write)
        self._on_work()
        return found

    def _key(self, store: str, tenant: str | None) -> int:
        return int(self._database.read(lambda each: self._store(each, store, tenant))["key"])


def _json(value: Mapping[str, str]) -> str:
    return msgspec.json.encode(dict(value)).decode()
