"""What a search reads of the truth: the store, the chunks that a filter allows, and the passages that were found.

Whatever an index says is looked up with a join on `store_files`, so that a file is found no more from the moment its
row is gone, however long the indexes still know its chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from appliance.core.errors import NotFoundError
from appliance.core.retrieval import AttributeValue
from appliance.retrieval.filters import Condition
from appliance.retrieval.fuse import Passage
from appliance.retrieval.parts import Ids
from appliance.retrieval.truth import RANGE, chunk_ids
from appliance.store.database import Connection, Database, Row

_WAITS = "EXISTS (SELECT 1 FROM chunks WHERE chunks.store = stores.key AND chunks.vector IS NULL)"


@dataclass(frozen=True, slots=True)
class Target:
    """The store that is searched.

    Attributes:
        model: The embedder's full name, or "" while nothing is embedded.
        embedded: Every chunk that is there has its vector.
    """

    key: int
    model: str
    embedded: bool


@dataclass(frozen=True, slots=True)
class Source:
    """The file that passages are from."""

    file: str
    filename: str
    attributes: Mapping[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class Reading:
    """Passages by chunk, and their sources by the key that passages name."""

    passages: Mapping[int, Passage]
    sources: Mapping[int, Source]


class Passages:
    """Reads `retrieval.db`; each method sees one state of it."""

    def __init__(self, database: Database) -> None:
        """Read from this database."""
        self._database = database

    def target(self, store: str, tenant: str) -> Target:
        """Return a store by its id.

        Raises:
            NotFoundError: The tenant has no such store.
        """

        def read(connection: Connection) -> Row | None:
            sql = f"SELECT key, model, {_WAITS} AS waits FROM stores WHERE id = ? AND tenant = ?"  # noqa: S608
            row: Row | None = connection.execute(sql, (store, tenant)).fetchone()
            return row

        row = self._database.read(read)
        if row is None:
            raise NotFoundError(f"There is no vector store {store!r}.", advice="List the stores of this API key.")
        return Target(row["key"], row["model"], embedded=not row["waits"])

    def allowed(self, store: int, condition: Condition) -> Ids:
        """Return the ids of the chunks whose files pass a filter, rising."""
        sql = f"SELECT {RANGE} FROM store_files WHERE {condition.indexed}"  # noqa: S608
        values = (store, *condition.parameters)
        return self._database.read(lambda each: chunk_ids(tuple(row) for row in each.execute(sql, values)))

    def read(self, store: int, chunks: Sequence[int], condition: Condition | None) -> Reading:
        """Return those of the chunks that are still there and pass the filter."""
        # CROSS JOIN keeps SQLite from beginning with all files of the store
        passing = "" if condition is None else f" AND ({condition.sql})"
        sql = f"""
            SELECT chunks.*, store_files.attributes, files.id AS file_id, files.filename
            FROM json_each(?) AS wanted CROSS JOIN chunks ON chunks.id = wanted.value
            CROSS JOIN store_files ON store_files.key = chunks.store_file
            CROSS JOIN files ON files.key = store_files.file
            WHERE store_files.store = ?{passing}
        """  # noqa: S608  (values are parameters)
        wanted = msgspec.json.encode(list(chunks)).decode()
        parameters = () if condition is None else condition.parameters

        def read(connection: Connection) -> list[Row]:
            return connection.execute(sql, (wanted, store, *parameters)).fetchall()

        rows = self._database.read(read)
        return Reading({row["id"]: _passage(row) for row in rows}, _sources(rows))


def _passage(row: Row) -> Passage:
    return Passage(
        chunk=row["id"],
        file=row["store_file"],
        position=row["position"],
        text=row["text"],
        start=row["start"],
        end=row["end"],
        page=row["page"],
        heading=tuple(msgspec.json.decode(row["heading"])),
        tokens=row["tokens"],
        text_hash=row["text_hash"],
    )


def _sources(rows: Sequence[Row]) -> dict[int, Source]:
    sources: dict[int, Source] = {}
    for row in rows:
        if row["store_file"] not in sources:
            attributes = msgspec.json.decode(row["attributes"])
            sources[row["store_file"]] = Source(row["file_id"], row["filename"], attributes)
    return sources
