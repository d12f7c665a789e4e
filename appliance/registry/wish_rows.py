"""The rows of `wishes`: what the registry reads and writes of them inside its transactions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from appliance.core.errors import ConflictError
from appliance.core.releases import Criteria
from appliance.core.wishes import Soak, Wish
from appliance.registry.trial import Trial
from appliance.security.audit import record
from appliance.store.database import Connection, Row


@dataclass(frozen=True, slots=True)
class Terms:
    """What a trial is held against.

    Attributes:
        baseline: 95 % of what the version before did took at most so many seconds, 0 where that is not known.
    """

    soak: Soak
    criteria: Criteria
    baseline: float = 0.0


def select_wishes(connection: Connection) -> Mapping[str, Wish]:
    """Return every wish by its name; a database that is only looked at may be from before there were any."""
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'wishes'").fetchone() is None:
        return {}
    return {row["name"]: _wish(row) for row in connection.execute("SELECT * FROM wishes ORDER BY name")}


def find_wish(connection: Connection, name: str) -> Wish | None:
    """Return the wish for a name."""
    row = connection.execute("SELECT * FROM wishes WHERE name = ?", (name,)).fetchone()
    return None if row is None else _wish(row)


def find_trial(connection: Connection, name: str) -> Trial | None:
    """Return what the policy knows of the wish for a name."""
    row = connection.execute("SELECT * FROM wishes WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    return Trial(row["version"], row["previous"], row["state"], row["boots"], row["reason"], row["code"])


def find_terms(connection: Connection, name: str) -> Terms | None:
    """Return what the trial of a name is held against."""
    row = connection.execute("SELECT soak, criteria, baseline FROM wishes WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    soak = msgspec.json.decode(row["soak"], type=Soak)
    return Terms(soak, msgspec.json.decode(row["criteria"], type=Criteria), row["baseline"])


def put_wish(connection: Connection, name: str, trial: Trial, terms: Terms, *, origin: str, since: float) -> None:
    """Write a wish in place of the one there may be; what runs stays as it is noted."""
    connection.execute(
        """
        INSERT INTO wishes (name, version, previous, state, reason, code, boots, since, origin, soak, criteria)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (name) DO UPDATE SET version = excluded.version, previous = excluded.previous,
            state = excluded.state, reason = excluded.reason, code = excluded.code, boots = excluded.boots,
            since = excluded.since, origin = excluded.origin, soak = excluded.soak, criteria = excluded.criteria,
            baseline = 0
        """,
        (
            name,
            trial.version,
            trial.previous,
            trial.state,
            trial.reason,
            trial.code,
            trial.boots,
            since,
            origin,
            msgspec.json.encode(terms.soak).decode(),
            msgspec.json.encode(terms.criteria).decode(),
        ),
    )


def update_trial(connection: Connection, name: str, trial: Trial, since: float) -> None:
    """Write how a trial goes on."""
    connection.execute(
        "UPDATE wishes SET state = ?, reason = ?, code = ?, boots = ?, since = ? WHERE name = ?",
        (trial.state, trial.reason, trial.code, trial.boots, since, name),
    )


def count_boots(connection: Connection, name: str, boots: int) -> None:
    """Write how often the server was started during a trial."""
    connection.execute("UPDATE wishes SET boots = ? WHERE name = ?", (boots, name))


def note_fact(connection: Connection, name: str, serving: str, fact: str, baseline: float | None) -> None:
    """Write what the serving floor found; `baseline` None leaves that of before."""
    connection.execute(
        "UPDATE wishes SET serving = ?, fact = ?, baseline = coalesce(?, baseline) WHERE name = ?",
        (serving, fact, baseline, name),
    )


def delete_wish(connection: Connection, name: str) -> int:
    """Delete a wish; return 0 if there is none, else 1."""
    return connection.execute("DELETE FROM wishes WHERE name = ?", (name,)).rowcount


def release_version(connection: Connection, name: str, version: str) -> None:
    """Let a version be removed: with the last version of a name its wish goes too.

    Raises:
        ConflictError: The name means it, or would mean it after the way back.
    """
    wish = find_wish(connection, name)
    if wish is None or version not in (wish.version, wish.previous):
        return
    if wish.state == "rolled_back" and version == wish.version:  # nobody wants it any more
        return
    others = connection.execute("SELECT 1 FROM models WHERE name = ? AND version != ?", (name, version))
    if others.fetchone() is None:
        delete_wish(connection, name)
        return
    what = "is what the name means" if version == wish.meant else "is kept for the way back"
    raise ConflictError(
        f"{name}:{version} {what}; nothing was removed.",
        advice=f"Activate another version first (appliance models activate {name}:VERSION), "
        f"or give up the wish: appliance models withdraw {name}",
        code="model_in_use",
    )


def keep_meaning(connection: Connection, name: str, origin: str) -> None:
    """Wish for the version registered last if nothing is wished for, so that a name means it whatever comes next."""
    row = connection.execute("SELECT version FROM models WHERE name = ? ORDER BY id DESC LIMIT 1", (name,)).fetchone()
    if row is None or find_trial(connection, name) is not None:
        return
    put_wish(
        connection,
        name,
        Trial(row["version"], None, "confirmed"),
        Terms(Soak(), Criteria()),
        origin=origin,
        since=time.time(),
    )
    record(connection, origin, "wish.activate", name, {"version": row["version"], "state": "confirmed"})


def _wish(row: Row) -> Wish:
    return Wish(
        name=row["name"],
        version=row["version"],
        previous=row["previous"],
        state=row["state"],
        reason=row["reason"],
        code=row["code"],
        since=row["since"],
        origin=row["origin"],
        serving=row["serving"],
        fact=row["fact"],
    )
