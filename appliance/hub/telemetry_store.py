"""The store of telemetry in the hub's SQLite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import inf, nextafter
from typing import Any

import msgspec

from appliance.core.fleet import STREAMS, Stream
from appliance.hub.batches import Batch, Gap
from appliance.hub.telemetry_records import KeptRow, OpenAlarm, Received, Tally, TelemetryStore
from appliance.store.database import Connection, Database

__all__ = ["KeptRow", "OpenAlarm", "Received", "SqliteTelemetry", "Tally", "TelemetryStore"]

AT_ONCE = 5000
"""Rows that one transaction of `trim` deletes, between which batches are written."""

_BEHIND = 2**62
_MOST_COUNTED = 100_000
_MOST_LOST = 2**53
_MOST_GAPS = 1000
"""Of a stream."""


class SqliteTelemetry:
    """Telemetry in `hub.db`."""

    def __init__(self, database: Database) -> None:
        """Use the hub's database."""
        self._database = database

    async def keep(self, batches: Sequence[Received]) -> None:
        """As `TelemetryStore.keep`."""
        await self._database.write(lambda connection: _keep(connection, batches))

    async def note_refusal(self, device: str, code: str, at: float) -> None:
        """As `TelemetryStore.note_refusal`."""
        update = "UPDATE telemetry_devices SET refused = refused + 1, refusal = ?, heard = ? WHERE number = ?"
        await self._database.write(
            lambda connection: connection.execute(update, (code, at, _number(connection, device))).rowcount
        )

    async def trim(self, *, received_before: float, most_rows: int) -> int:
        """As `TelemetryStore.trim`, a few thousand rows at a time."""
        total = 0
        await self._database.write(lambda connection: _trim_gaps(connection, received_before))
        while deleted := await self._database.write(lambda connection: _trim_age(connection, received_before)):
            total += deleted
        while deleted := await self._database.write(lambda connection: _trim_rows(connection, most_rows)):
            total += deleted
        return total

    async def forget(self, device: str) -> None:
        """As `TelemetryStore.forget`."""
        await self._database.write(lambda connection: _forget(connection, device))

    def rows(
        self,
        *,
        device: str | None = None,
        stream: Stream | None = None,
        received_from: float = 0.0,
        received_to: float = float("inf"),
        before: int | None = None,
        limit: int = 100,
    ) -> tuple[list[KeptRow], int | None]:
        """As `TelemetryStore.rows`."""
        values: dict[str, Any] = {
            "device": device,
            "stream": None if stream is None else STREAMS.index(stream),
            "since": received_from,
            "until": received_to,
            "before": before if before is not None else _BEHIND,
            "limit": limit + 1,
        }
        select = _ROWS.format(
            device="" if device is None else "AND telemetry_devices.device = :device",
            stream="" if stream is None else "AND stream = :stream",
        )

        def read(connection: Connection) -> list[Any]:
            places = {
                "low": _first_since(connection, received_from),
                "high": min(values["before"], _first_since(connection, nextafter(received_to, inf))),
            }
            return connection.execute(select, {**values, **places}).fetchall()

        found = self._database.read(read)
        return [_kept(each) for each in found[:limit]], (int(found[limit - 1]["id"]) if len(found) > limit else None)

    def latest_health(self, devices: Iterable[str] | None = None) -> dict[str, KeptRow]:
        """As `TelemetryStore.latest_health`."""
        wanted = None if devices is None else set(devices)
        rows = self._database.read(lambda connection: connection.execute(_LATEST, ("health",)).fetchall())
        return {each["name"]: _kept(each) for each in rows if wanted is None or each["name"] in wanted}

    def open_alarms(self, device: str | None = None) -> list[OpenAlarm]:
        """As `TelemetryStore.open_alarms`."""
        rows = self._database.read(lambda connection: connection.execute(_LATEST, ("alarm",)).fetchall())
        return [alarm for each in rows if device in {None, each["name"]} for alarm in _open(_kept(each))]

    def tallies(self, device: str | None = None) -> list[Tally]:
        """As `TelemetryStore.tallies`."""
        select = "SELECT * FROM telemetry_devices WHERE :device IS NULL OR device = :device ORDER BY device"
        rows = self._database.read(lambda connection: connection.execute(select, {"device": device}).fetchall())
        names = ("device", "lost", "refused", "refusal", "skew", "heard")
        return [Tally(**{name: each[name] for name in names}) for each in rows]


def _keep(connection: Connection, batches: Sequence[Received]) -> None:
    for received in batches:
        batch, at = received.batch, received.at
        device, stream = _number(connection, batch.device), STREAMS.index(batch.stream)
        key = (device, stream, batch.boot)
        added = _insert(connection, key, batch, at)
        for gap in batch.gaps:
            _note_gap(connection, key, gap, at)
        if added:
            _count(connection, {(device, stream): added})
        if batch.stream in {"health", "alarm"} and batch.facts:
            _note_latest(connection, key, batch, at)
        connection.execute("UPDATE telemetry_devices SET heard = max(heard, ?) WHERE number = ?", (at, device))


_Key = tuple[int, int, int]
_INSERT = """
    INSERT OR IGNORE INTO telemetry_rows (device, stream, boot, sequence, at, received, kind, body)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""


def _insert(connection: Connection, key: _Key, batch: Batch, at: float) -> int:
    """Return how many rows were new; those that a gap told of as lost are lost no more."""
    rows = [(*key, each.sequence, each.at, at, each.kind, each.body) for each in batch.facts]
    gap = connection.execute(_GAP_OVER, (*key, batch.first, batch.last)).fetchone()
    if gap is None:
        return int(connection.executemany(_INSERT, rows).rowcount) if rows else 0
    before = _present(connection, key, gap["first"], gap["last"])
    added = int(connection.executemany(_INSERT, rows).rowcount) if rows else 0
    after = _present(connection, key, gap["first"], gap["last"])
    _add_lost(connection, key, gap["last"], max(-(after - before), -int(gap["lost"])))
    return added


_GAP_OVER = """
    SELECT * FROM telemetry_gaps
    WHERE device = ? AND stream = ? AND boot = ? AND last >= ? AND first <= ? ORDER BY last LIMIT 1
"""


def _note_gap(connection: Connection, key: _Key, gap: Gap, at: float) -> None:
    """Take over a gap in the place of those that it has grown from."""
    within = "device = ? AND stream = ? AND boot = ? AND last >= ? AND first <= ?"
    values = (*key, gap.first, gap.last)
    told = connection.execute(f"SELECT total(lost) FROM telemetry_gaps WHERE {within}", values).fetchone()[0]  # noqa: S608
    connection.execute(f"DELETE FROM telemetry_gaps WHERE {within}", values)  # noqa: S608
    lost = max(0, gap.count - _present(connection, key, gap.first, gap.last))
    insert = "INSERT INTO telemetry_gaps VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?) ON CONFLICT DO NOTHING"
    connection.execute(insert, (*key, gap.last, gap.first, gap.since, gap.until, at))
    connection.execute("UPDATE telemetry_devices SET lost = max(0, lost - ?) WHERE number = ?", (int(told), key[0]))
    _add_lost(connection, key, gap.last, lost)


def _add_lost(connection: Connection, key: _Key, last: int, lost: int) -> None:
    lost = min(lost, _MOST_LOST)
    update = "UPDATE telemetry_gaps SET lost = lost + ? WHERE device = ? AND stream = ? AND boot = ? AND last = ?"
    connection.execute(update, (lost, *key, last))
    update = "UPDATE telemetry_devices SET lost = min(max(0, lost + ?), ?) WHERE number = ?"
    connection.execute(update, (lost, _MOST_LOST, key[0]))


def _present(connection: Connection, key: _Key, first: int, last: int) -> int:
    select = """
        SELECT count(*) FROM (
            SELECT 1 FROM telemetry_rows
            WHERE device = ? AND stream = ? AND boot = ? AND sequence BETWEEN ? AND ? LIMIT ?
        )
    """
    return int(connection.execute(select, (*key, first, last, _MOST_COUNTED)).fetchone()[0])


def _note_latest(connection: Connection, key: _Key, batch: Batch, at: float) -> None:
    """Keep what was told last by boot and sequence, whatever the clocks said."""
    device, stream, boot = key
    newest = batch.facts[-1]
    upsert = """
        INSERT INTO telemetry_latest VALUES (?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET boot = excluded.boot, sequence = excluded.sequence, at = excluded.at,
            received = excluded.received, kind = excluded.kind, body = excluded.body
        WHERE (excluded.boot, excluded.sequence) > (boot, sequence)
    """
    values = (device, stream, boot, newest.sequence, newest.at, at, newest.kind, newest.body)
    if connection.execute(upsert, values).rowcount and batch.stream == "health":
        connection.execute("UPDATE telemetry_devices SET skew = ? WHERE number = ?", (at - newest.at, device))


def _number(connection: Connection, device: str) -> int:
    found = connection.execute("SELECT number FROM telemetry_devices WHERE device = ?", (device,)).fetchone()
    if found is None:
        insert = "INSERT INTO telemetry_devices (device) VALUES (?) RETURNING number"
        found = connection.execute(insert, (device,)).fetchone()
    return int(found["number"])


def _count(connection: Connection, added: Mapping[tuple[int, int], int]) -> None:
    upsert = "INSERT INTO telemetry_streams VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET rows = rows + excluded.rows"
    connection.executemany(upsert, [(device, stream, rows) for (device, stream), rows in added.items()])


def _trim_age(connection: Connection, before: float) -> int:
    delete = """
        DELETE FROM telemetry_rows
        WHERE id IN (SELECT id FROM telemetry_rows ORDER BY id LIMIT ?) AND received < ? RETURNING device, stream
    """
    gone = Counter(tuple(each) for each in connection.execute(delete, (AT_ONCE, before)).fetchall())
    _count(connection, {(device, stream): -rows for (device, stream), rows in gone.items()})
    return gone.total()


def _trim_gaps(connection: Connection, before: float) -> None:
    connection.execute("DELETE FROM telemetry_gaps WHERE received < ?", (before,))
    surplus = """
        SELECT device, stream, boot, last FROM (
            SELECT *, row_number() OVER (PARTITION BY device, stream ORDER BY boot DESC, last DESC) AS place
            FROM telemetry_gaps
        ) WHERE place > ?
    """
    connection.execute(f"DELETE FROM telemetry_gaps WHERE (device, stream, boot, last) IN ({surplus})", (_MOST_GAPS,))  # noqa: S608


def _trim_rows(connection: Connection, most: int) -> int:
    full = connection.execute("SELECT * FROM telemetry_streams WHERE rows > ? LIMIT 1", (most,)).fetchone()
    if full is None:
        return 0
    delete = """
        DELETE FROM telemetry_rows WHERE id IN (
            SELECT id FROM telemetry_rows WHERE device = ? AND stream = ? ORDER BY boot, sequence LIMIT ?
        )
    """
    excess = min(AT_ONCE, full["rows"] - most)
    gone = connection.execute(delete, (full["device"], full["stream"], excess)).rowcount
    _count(connection, {(full["device"], full["stream"]): -max(gone, 1)})
    return gone


def _first_since(connection: Connection, received: float) -> int:
    """Return the id of the first row that came at a time or later, found by halving: ids rise with the hub's time.

    Where the hub's clock was set back, rows from before that may be passed over.
    """
    low, high = 0, int(connection.execute("SELECT max(id) FROM telemetry_rows").fetchone()[0] or 0) + 1
    if received == inf:
        return _BEHIND
    while low < high:
        middle = (low + high) // 2
        row = connection.execute("SELECT id, received FROM telemetry_rows WHERE id >= ? LIMIT 1", (middle,)).fetchone()
        if row is None or row["received"] >= received:
            high = middle
        else:
            low = int(row["id"]) + 1
    return low


def _forget(connection: Connection, device: str) -> None:
    number = _number(connection, device)
    for table in ("rows", "gaps", "streams", "latest"):
        connection.execute(f"DELETE FROM telemetry_{table} WHERE device = ?", (number,))  # noqa: S608
    connection.execute("DELETE FROM telemetry_devices WHERE number = ?", (number,))


_ROWS = """
    SELECT telemetry_rows.*, telemetry_devices.device AS name
    FROM telemetry_rows JOIN telemetry_devices ON telemetry_devices.number = telemetry_rows.device
    WHERE id >= :low AND id < :high AND received BETWEEN :since AND :until {device} {stream}
    ORDER BY id DESC LIMIT :limit
"""
_LATEST = f"""
    SELECT telemetry_latest.*, telemetry_devices.device AS name
    FROM telemetry_latest JOIN telemetry_devices ON telemetry_devices.number = telemetry_latest.device
    WHERE stream = CASE ? WHEN 'health' THEN {STREAMS.index("health")} ELSE {STREAMS.index("alarm")} END
    ORDER BY telemetry_devices.device
"""  # noqa: S608


def _kept(each: Any) -> KeptRow:
    return KeptRow(
        device=each["name"],
        stream=STREAMS[each["stream"]],
        boot=each["boot"],
        sequence=each["sequence"],
        at=each["at"],
        received=each["received"],
        kind=each["kind"],
        body=msgspec.json.decode(each["body"], type=dict[str, Any]),
    )


class _OpenEntry(msgspec.Struct, frozen=True):
    since: float = 0.0
    severity: str = "warning"
    detail: str = ""


def _open(row: KeptRow) -> list[OpenAlarm]:
    """Return the alarms that a device listed as open with its last one; a list that is none counts as empty."""
    try:
        entries = msgspec.convert(row.body.get("open", {}), dict[str, _OpenEntry])
    except msgspec.ValidationError:
        return []
    return [
        OpenAlarm(row.device, name, each.since, each.severity, each.detail, row.received)
        for name, each in sorted(entries.items())
    ]
