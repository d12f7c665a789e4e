"""The rows of files that are being taken in: who works on which, and how far it is.

A worker claims what it works on for a while and renews that as long as it lives. Claims of the dead end by themselves,
at the latest when the next process that owns the database starts. Whatever a worker has made is written only while the
claim is still its own and the file is still wanted, so what was removed, cancelled or taken over meanwhile is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from appliance.core.retrieval import Chunking
from appliance.retrieval.erasure import delete_unused
from appliance.retrieval.parts import Piece
from appliance.store.database import Connection, Row

MOST_ATTEMPTS = 5
"""So often a file is begun; the process may have died of it each time."""


@dataclass(frozen=True, slots=True)
class Job:
    """A file that is to be cut into chunks."""

    key: int
    store: int
    tenant: str
    model: str
    file: str
    filename: str
    media_type: str
    size: int
    chunking: Chunking
    attempts: int


@dataclass(frozen=True, slots=True)
class Claims:
    """A worker's name, and how long a claim lasts without being renewed."""

    owner: str
    lease_s: float

    def free(self, now: float) -> tuple[str, tuple[object, ...]]:
        """Return the condition for rows that may be claimed, and its values; the clock may have been set back."""
        return "(lease_until <= ? OR lease_until > ? OR lease_owner = '')", (now, now + 2 * self.lease_s)


def claim(connection: Connection, claims: Claims, now: float, stage: str, limit: int) -> list[Job]:
    """Claim files in a stage that nobody works on, oldest first."""
    free, values = claims.free(now)
    sql = f"""
        UPDATE store_files SET lease_owner = ?, lease_until = ?, attempts = attempts + 1 WHERE key IN (
            SELECT key FROM store_files WHERE stage = ? AND status = 'in_progress' AND {free} ORDER BY key LIMIT ?
        ) RETURNING key
    """  # noqa: S608
    rows = connection.execute(sql, (claims.owner, now + claims.lease_s, stage, *values, limit)).fetchall()
    sql = """
        SELECT w.key, w.store, s.tenant, s.model, f.id, f.filename, f.media_type, f.size, w.most_tokens,
            w.overlap_tokens, w.attempts
        FROM store_files w JOIN files f ON f.key = w.file JOIN stores s ON s.key = w.store WHERE w.key = ?
    """
    return [_job(connection.execute(sql, (key,)).fetchone()) for key in sorted(int(key) for (key,) in rows)]


def _job(row: Row) -> Job:
    chunking = Chunking(row["most_tokens"], row["overlap_tokens"])
    return Job(
        row["key"],
        row["store"],
        row["tenant"],
        row["model"],
        row["id"],
        row["filename"],
        row["media_type"],
        row["size"],
        chunking,
        row["attempts"],
    )


def renew(connection: Connection, claims: Claims, now: float) -> None:
    """Make a worker's claims last longer."""
    for table, condition in (("store_files", "AND status = 'in_progress'"), ("stores", "")):
        sql = f"UPDATE {table} SET lease_until = ? WHERE lease_owner = ? {condition}"  # noqa: S608
        connection.execute(sql, (now + claims.lease_s, claims.owner))


def release(connection: Connection, claims: Claims) -> None:
    """Give a worker's files back, to be begun again; it was not their fault."""
    sql = """
        UPDATE store_files SET lease_owner = '', lease_until = 0, attempts = max(0, attempts - 1)
        WHERE lease_owner = ? AND stage IN ('queued', 'cut')
    """
    connection.execute(sql, (claims.owner,))


def end_try(connection: Connection, claims: Claims, code: str, message: str) -> None:
    """Give a worker's files back, to be begun again; those that were begun often enough have failed."""
    sql = """
        UPDATE store_files SET status = 'failed', error_code = ?, error = ?, lease_owner = ''
        WHERE lease_owner = ? AND stage = 'queued' AND status = 'in_progress' AND attempts >= ?
    """
    connection.execute(sql, (code, message, claims.owner, MOST_ATTEMPTS))
    connection.execute(
        "UPDATE store_files SET lease_owner = '', lease_until = 0 WHERE lease_owner = ? AND stage IN ('queued', 'cut')",
        (claims.owner,),
    )


def take_over(connection: Connection) -> None:
    """End all claims: whoever had them is gone, for this process owns the database now. Attempts stay counted."""
    for table in ("store_files", "stores"):
        connection.execute(f"UPDATE {table} SET lease_owner = '', lease_until = 0 WHERE lease_owner <> ''")  # noqa: S608


def fail(connection: Connection, key: int, code: str, message: str) -> None:
    """Say that a file cannot be taken in."""
    sql = """
        UPDATE store_files SET status = 'failed', error_code = ?, error = ?, lease_owner = ''
        WHERE key = ? AND status = 'in_progress'
    """
    connection.execute(sql, (code, message, key))


def keep_chunks(connection: Connection, claims: Claims, cut: Sequence[tuple[Job, Sequence[Piece]]]) -> None:
    """Write the chunks of files that are still the worker's, and still wanted, and how they were cut in fact."""
    sql = "SELECT 1 FROM store_files WHERE key = ? AND stage = 'queued' AND status = 'in_progress' AND lease_owner = ?"
    for job, pieces in cut:
        if connection.execute(sql, (job.key, claims.owner)).fetchone() is None:
            continue
        last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'chunks'").fetchone()
        first = 1 + (last[0] if last else 0)
        connection.executemany(
            """
            INSERT INTO chunks
                (id, store, store_file, position, text, start, "end", page, heading, tokens, text_hash)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            """,
            [_row(first + position, position, job, each) for position, each in enumerate(pieces)],
        )
        usage = sum(len(each.text.encode()) for each in pieces)
        update = """
            UPDATE store_files
            SET stage = 'cut', first_chunk = ?, chunks = ?, usage = ?, most_tokens = ?, overlap_tokens = ? WHERE key = ?
        """
        sizes = job.chunking.most_tokens, job.chunking.overlap_tokens
        connection.execute(update, (first, len(pieces), usage, *sizes, job.key))


def _row(chunk: int, position: int, job: Job, piece: Piece) -> tuple[object, ...]:
    heading = msgspec.json.encode(piece.heading).decode()
    hashed = text_hash(job.tenant, piece.text)
    place = (piece.start, piece.end, piece.page)
    return (chunk, job.store, job.key, position, piece.text, *place, heading, piece.tokens, hashed)


def text_hash(tenant: str, text: str) -> bytes:
    """Return the SHA-256 by which the vector of a text is found again.

    The tenant is part of it: who could see that a text is taken in sooner would learn that somebody else had it.
    """
    return hashlib.sha256(f"{tenant}\0{text}".encode()).digest()


def cut_chunks(connection: Connection, keys: Sequence[int]) -> dict[int, list[tuple[int, str]]]:
    """Return ids and texts of the chunks of those files that are still there, by store."""
    found: dict[int, list[tuple[int, str]]] = {}
    sql = """
        SELECT c.store, c.id, c.text FROM store_files w JOIN chunks c ON c.store_file = w.key
        WHERE w.key = ? AND w.stage = 'cut' ORDER BY c.position
    """
    for key in keys:
        for store, chunk, text in connection.execute(sql, (key,)):
            found.setdefault(store, []).append((chunk, text))
    return found


def note_keywords(connection: Connection, keys: Sequence[int]) -> None:
    """Say that files are in the keyword index; one without any text is through with that."""
    sql = """
        UPDATE store_files SET
            stage = iif(chunks, 'keywords', 'done'), lease_owner = '', attempts = 0,
            status = iif(chunks OR status <> 'in_progress', status, 'completed')
        WHERE key = ? AND stage = 'cut'
    """
    connection.executemany(sql, [(key,) for key in keys])


def embed_again(connection: Connection, store: int) -> None:
    """Forget a store's model and its vectors, and queue all that is searchable in it to be embedded."""
    vectors = [
        int(vector)
        for (vector,) in connection.execute(
            "SELECT DISTINCT vector FROM chunks WHERE store = ? AND vector IS NOT NULL", (store,)
        )
    ]
    connection.execute("UPDATE chunks SET vector = NULL WHERE store = ? AND vector IS NOT NULL", (store,))
    delete_unused(connection, vectors)
    connection.execute("UPDATE stores SET model = '', dimensions = 0, lease_owner = '' WHERE key = ?", (store,))
    sql = """
        UPDATE store_files SET stage = 'keywords', status = 'in_progress', error_code = '', error = '', embedded = 0,
            usage = (SELECT coalesce(sum(length(CAST(text AS BLOB))), 0) FROM chunks WHERE store_file = store_files.key)
        WHERE store = ? AND stage IN ('keywords', 'done') AND chunks > 0
    """
    connection.execute(sql, (store,))
