"""Rows of `retrieval.db` as the doors know them, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from appliance.core.errors import InvalidRequestError
from appliance.core.retrieval import (
    AttributeValue,
    Chunking,
    FileCounts,
    Reembedding,
    StoredFile,
    StoreFile,
    VectorStore,
)
from appliance.retrieval.filters import is_key
from appliance.store.database import Connection, Row

DAY_S = 86_400

MOST_ATTRIBUTES = 16
MOST_KEY = 64
MOST_VALUE = 512

SELECT_STORE_FILE = """
    SELECT store_files.*, files.id AS file_id, stores.id AS store_id
    FROM store_files JOIN files ON files.key = store_files.file JOIN stores ON stores.key = store_files.store
"""


def attributes_text(attributes: Mapping[str, AttributeValue]) -> str:
    """Return a file's attributes as JSON.

    Raises:
        InvalidRequestError: There are more than 16, or one is too long or no finite number, or has a name that no
            filter can have.
    """
    if len(attributes) > MOST_ATTRIBUTES:
        raise _bad(f"There are {len(attributes)} attributes; {MOST_ATTRIBUTES} are the most.")
    for key, value in attributes.items():
        if not 0 < len(key) <= MOST_KEY:
            raise _bad(f"An attribute's name has {len(key)} characters; 1 to {MOST_KEY} are taken.")
        if not is_key(key):
            raise _bad(f"The attribute's name {key!r} has a quotation mark, a backslash or a control character.")
        if not _is_text(key) or (isinstance(value, str) and not _is_text(value)):
            raise _bad(f"The attribute {key!r} has a NUL or half a surrogate pair.")
        if isinstance(value, str) and len(value) > MOST_VALUE:
            raise _bad(f"The attribute {key!r} has {len(value)} characters; {MOST_VALUE} are the most.")
        if isinstance(value, float) and not math.isfinite(value):
            raise _bad(f"The attribute {key!r} is no finite number.")
    return msgspec.json.encode(dict(attributes)).decode()


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= each <= "\udfff" for each in text)


def _bad(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="attributes", code="invalid_value")


def to_file(row: Row) -> StoredFile:
    """Return a row of `files`."""
    return StoredFile(
        row["id"], row["filename"], row["purpose"], row["size"], row["media_type"], row["created"], row["expires"]
    )


def to_store(connection: Connection, row: Row) -> VectorStore:
    """Return a row of `stores` with what its files add up to."""
    days = row["expires_after_days"]
    usage = connection.execute(
        "SELECT coalesce(sum(usage), 0) FROM store_files WHERE store = ?", (row["key"],)
    ).fetchone()[0]
    return VectorStore(
        id=row["id"],
        name=row["name"],
        description=row["description"],
        created=row["created"],
        last_active=row["last_active"],
        usage=usage,
        counts=counts(connection, "store = ?", row["key"]),
        metadata=msgspec.json.decode(row["metadata"]),
        model=row["model"],
        expires_after_days=days,
        expires=None if days is None else row["last_active"] + days * DAY_S,
        reembedding=None if row["next_model"] is None else _reembedding(connection, row),
    )


def _reembedding(connection: Connection, row: Row) -> Reembedding:
    sql = "SELECT count(*), coalesce(sum(id <= ?), 0) FROM chunks WHERE store = ?"
    total, done = connection.execute(sql, (row["next_chunk"], row["key"])).fetchone()
    return Reembedding(row["next_model"], done, total)


def to_store_file(row: Row) -> StoreFile:
    """Return a row of `SELECT_STORE_FILE`."""
    return StoreFile(
        id=row["file_id"],
        store=row["store_id"],
        created=row["created"],
        status=row["status"],
        usage=row["usage"],
        chunking=Chunking(row["most_tokens"], row["overlap_tokens"]),
        attributes=msgspec.json.decode(row["attributes"]),
        batch=row["batch"],
        error_code=row["error_code"],
        error=row["error"],
        chunks=row["chunks"] if row["stage"] in ("keywords", "done") else 0,
        embedded=row["embedded"],
    )


def counts(connection: Connection, where: str, value: object) -> FileCounts:
    """Return the number of store files by status; `where` is ours, never a caller's text."""
    found = connection.execute(f"SELECT status, count(*) FROM store_files WHERE {where} GROUP BY status", (value,))  # noqa: S608
    return FileCounts(**{str(status): int(number) for status, number in found})
