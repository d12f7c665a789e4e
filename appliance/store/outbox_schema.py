"""`telemetry.db`: its schema, and the changes and questions to it, each a function of a connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from appliance.core.fleet import STREAMS, Stream
from appliance.store.database import Connection
from appliance.store.database import Row as Record
from appliance.store.migrations import Migration
from appliance.store.outbox_rows import GAP, Row, merge, rank, squeeze, without

MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        "outbox",
        (
            """
            CREATE TABLE outbox (
                class INTEGER NOT NULL,
                boot INTEGER NOT NULL,
                last INTEGER NOT NULL,
                first INTEGER NOT NULL,
                at REAL NOT NULL,
                until REAL NOT NULL,
                lived REAL NOT NULL,
                lost INTEGER NOT NULL,
                kind TEXT NOT NULL,
                body BLOB NOT NULL,
                size INTEGER NOT NULL,
                PRIMARY KEY (class, boot, last)
            ) STRICT
            """,
            "CREATE TABLE totals (class INTEGER PRIMARY KEY, rows INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT",
            "INSERT INTO totals VALUES (0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)",
            "CREATE TABLE life (boot INTEGER NOT NULL, lived REAL NOT NULL) STRICT",
            "INSERT INTO life VALUES (0, 0)",
        ),
    ),
)
"""The history of its schema, oldest first."""


@dataclass(frozen=True, slots=True)
class Held:
    """What is waiting in the outbox of one stream; `bytes` counts as the cap does."""

    rows: int
    bytes: int


Position = tuple[int, int]
"""Boot and sequence: the order of a stream's rows, whatever the clock said."""


def begin_boot(connection: Connection, known: int) -> tuple[int, float]:
    """Count a start of the program. Returns its number, and the seconds that the program ran before."""
    boot, lived = connection.execute("SELECT boot, lived FROM life").fetchone()
    select = "SELECT boot, lived FROM outbox WHERE class = ? ORDER BY boot DESC, last DESC LIMIT 1"
    for number in range(len(STREAMS)):
        newest = connection.execute(select, (number,)).fetchone()
        boot, lived = (max(old, new) for old, new in zip((boot, lived), newest or (0, 0.0), strict=True))
    boot = max(boot, known) + 1
    connection.execute("UPDATE life SET boot = ?, lived = ?", (boot, lived))
    return boot, lived


def held(connection: Connection) -> dict[Stream, Held]:
    """Return what waits, by stream."""
    totals = {row["class"]: Held(row["rows"], row["bytes"]) for row in connection.execute("SELECT * FROM totals")}
    return {stream: totals[number] for number, stream in enumerate(STREAMS)}


def add(connection: Connection, rows: Iterable[Row]) -> None:
    """Write rows; one that is there already is left as it is."""
    added: dict[Stream, list[int]] = {}
    for row in rows:
        values = (rank(row.stream), row.boot, row.last, row.first, row.at, row.until, row.lived, row.lost)
        insert = "INSERT OR IGNORE INTO outbox VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        if connection.execute(insert, (*values, row.kind, row.body, row.size)).rowcount:
            added.setdefault(row.stream, []).append(row.size)
    for stream, sizes in added.items():
        _count(connection, stream, len(sizes), sum(sizes))


def rows_after(connection: Connection, stream: Stream, after: Position = (0, 0)) -> Iterator[Row]:
    """Yield the rows of a stream behind a position, the oldest first; nothing may be written meanwhile."""
    select = "SELECT * FROM outbox WHERE class = ? AND (boot, last) > (?, ?) ORDER BY boot, last"
    return (_row(stream, each) for each in connection.execute(select, (rank(stream), *after)))


def newest(connection: Connection, stream: Stream) -> Position | None:
    """Return the position of the newest row of a stream, or None if it has none."""
    select = "SELECT boot, last FROM outbox WHERE class = ? ORDER BY boot DESC, last DESC LIMIT 1"
    found = connection.execute(select, (rank(stream),)).fetchone()
    return (found["boot"], found["last"]) if found else None


def expire(connection: Connection, before: float) -> int:
    """Turn the rows that were written before a point in the program's life into gaps. Returns how many facts."""
    return sum(_squeeze(connection, each, lambda _, row: row.lived >= before)[0] for each in STREAMS)


def shrink(connection: Connection, most: int) -> int:
    """Make everything fit into a number of bytes. Returns how many facts were lost.

    The oldest of the lowest class goes first; a last gap for each class stays.
    """
    excess = connection.execute("SELECT sum(bytes) FROM totals").fetchone()[0] - most
    lost = 0
    for stream in reversed(STREAMS):
        if excess <= 0:
            break
        facts, freed = _squeeze(connection, stream, _freed(excess))
        lost += facts
        excess -= freed
    return lost


def acknowledge(connection: Connection, stream: Stream, boot: int, first: int, last: int) -> int:
    """Delete what the hub has. Returns how many rows that were."""
    key = (rank(stream), boot, first, last)
    within = "class = ? AND boot = ? AND last >= ? AND last <= ? AND first >= ?"
    counting = f"SELECT count(*), total(size) FROM outbox WHERE {within}"  # noqa: S608
    gone, size = connection.execute(counting, (*key, first)).fetchone()
    connection.execute(f"DELETE FROM outbox WHERE {within}", (*key, first))  # noqa: S608
    _count(connection, stream, -gone, -int(size))
    # What overlaps still is a gap that was made of the rows while they were on their way: one at each end at most.
    ends = "SELECT * FROM outbox WHERE class = ? AND boot = ? AND last >= ? ORDER BY last LIMIT 2"
    for gap in [_row(stream, each) for each in connection.execute(ends, key[:3])]:
        rest = without(gap, first, last)
        if rest != [gap]:
            _replace(connection, [gap], rest)
    return int(gone)


def refuse(connection: Connection, stream: Stream, boot: int, first: int, last: int) -> int:
    """Put a gap in the place of rows that the hub will never take; gaps alone go. Returns how many facts were lost."""
    rows = list(takewhile(_until(boot, last), rows_after(connection, stream, (boot, first - 1))))
    if not rows:
        return 0
    gap: Row | None = None
    for each in rows:
        gap = merge(gap, each)
    facts = sum(each.kind != GAP for each in rows)
    _replace(connection, rows, [gap] if gap and facts else [])
    return facts


def _until(boot: int, last: int) -> Callable[[Row], bool]:
    return lambda row: (row.boot, row.last) <= (boot, last)


def _freed(excess: int) -> Callable[[int, Row], bool]:
    return lambda freed, _: freed >= excess


def _squeeze(connection: Connection, stream: Stream, enough: Callable[[int, Row], bool]) -> tuple[int, int]:
    """Return how many facts were lost and how many bytes are free now."""
    victims, gap = squeeze(rows_after(connection, stream), enough)
    _replace(connection, victims, [gap] if gap else [])
    freed = sum(each.size for each in victims) - (gap.size if gap else 0)
    return sum(each.kind != GAP for each in victims), freed


def _replace(connection: Connection, old: Sequence[Row], new: Sequence[Row]) -> None:
    if not old:
        return
    delete = "DELETE FROM outbox WHERE class = ? AND boot = ? AND last = ?"
    connection.executemany(delete, [(rank(each.stream), each.boot, each.last) for each in old])
    _count(connection, old[0].stream, -len(old), -sum(each.size for each in old))
    add(connection, new)


def _count(connection: Connection, stream: Stream, rows: int, size: int) -> None:
    update = "UPDATE totals SET rows = rows + ?, bytes = bytes + ? WHERE class = ?"
    connection.execute(update, (rows, size, rank(stream)))


def _row(stream: Stream, each: Record) -> Row:
    return Row(
        stream=stream,
        boot=each["boot"],
        first=each["first"],
        last=each["last"],
        at=each["at"],
        until=each["until"],
        lived=each["lived"],
        lost=each["lost"],
        kind=each["kind"],
        body=each["body"],
    )
