"""The embedding cache's table: vectors by key, each with the time it was last used, counted in batches of writes.

A row proves itself by a checksum over key and vector: SQLite notices a damaged tree of pages, but not a flipped bit in
a value.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from zlib import crc32

from appliance.core.types import Vector
from appliance.store.database import Connection

ROW_BYTES = 256
"""What a row takes beside its vector: the key, twice, and its places in both indexes."""

FILL = 0.9
"""Share of the room that is kept when rows had to go, so that not every write has to drop some."""


def select_vectors(connection: Connection, keys: Iterable[bytes]) -> dict[bytes, Vector]:
    """Return the vectors of the keys that are there and undamaged."""
    found: dict[bytes, Vector] = {}
    for key in keys:
        row = connection.execute("SELECT vector, checksum FROM embeddings WHERE key = ?", (key,)).fetchone()
        if row is not None and row["checksum"] == _checksum(key, row["vector"]):
            found[key] = array("f", row["vector"])
    return found


def is_any_there(connection: Connection, keys: Iterable[bytes]) -> bool:
    """Return True if one of the keys is there; reads the index alone."""
    select = "SELECT 1 FROM embeddings WHERE key = ?"
    return any(connection.execute(select, (key,)).fetchone() is not None for key in keys)


def write_batch(connection: Connection, vectors: Mapping[bytes, bytes], used: Iterable[bytes], most_bytes: int) -> None:
    """Note which rows were used, make room, and add vectors as the newest.

    Args:
        connection: In a transaction.
        vectors: Vectors by key, as many of them as fit.
        used: Keys that were looked up since the last batch, in any order.
        most_bytes: Size that the file may have.
    """
    now = connection.execute("SELECT coalesce(max(used), 0) + 1 FROM embeddings").fetchone()[0]
    connection.executemany("UPDATE embeddings SET used = ? WHERE key = ?", ((now, key) for key in used))
    rows, bytes_wanted = [], 0
    for key, vector in vectors.items():
        bytes_wanted += row_bytes(vector)
        if bytes_wanted > most_bytes // 2:
            break
        rows.append((key, now, _checksum(key, vector), vector))
    if make_room(connection, sum(row_bytes(each[-1]) for each in rows), most_bytes):
        insert = "INSERT OR REPLACE INTO embeddings (key, used, checksum, vector) VALUES (?, ?, ?, ?)"
        connection.executemany(insert, rows)


def row_bytes(vector: bytes) -> int:
    """Return at most what a vector takes in the file: up to half of a page that holds few rows is lost."""
    return 2 * len(vector) + ROW_BYTES


def make_room(connection: Connection, bytes_wanted: int, most_bytes: int) -> bool:
    """Drop the rows that were unused for longest until so many bytes are free; return whether they are."""
    if bytes_in_use(connection) + bytes_wanted <= most_bytes:
        return True
    count = connection.execute("SELECT count(*) FROM embeddings").fetchone()[0]
    dropped = max(1, round(count * (1 - FILL)))
    while count > 0 and bytes_in_use(connection) + bytes_wanted > FILL * most_bytes:
        connection.execute(
            "DELETE FROM embeddings WHERE id IN (SELECT id FROM embeddings ORDER BY used, id LIMIT ?)", (dropped,)
        )
        count -= dropped
    return bytes_in_use(connection) + bytes_wanted <= most_bytes


def bytes_in_use(connection: Connection) -> int:
    """Return the size of the pages that hold something."""
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    used: int = (pages - free) * size
    return used


def delete_vectors(connection: Connection, keys: Sequence[bytes]) -> int:
    """Delete rows, overwrite where they stood, and return how many there were."""
    connection.execute("PRAGMA secure_delete=ON").fetchall()
    return connection.executemany("DELETE FROM embeddings WHERE key = ?", ((key,) for key in keys)).rowcount


def _checksum(key: bytes, vector: bytes) -> int:
    return crc32(vector, crc32(key))
