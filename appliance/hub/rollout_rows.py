"""Rows of the tables of rollouts, as plain data and back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from appliance.hub.rollout_policy import Plan, Progress, Tally
from appliance.hub.rollout_records import Audience, DeviceJob, Member, Options, Rollout
from appliance.store.database import Row

OPEN_TO_NEWCOMERS = """
    SELECT * FROM rollouts AS r WHERE state = 'completed' AND NOT EXISTS (
        SELECT 1 FROM rollouts AS other WHERE other.model = r.model AND (
            other.state IN ('running', 'paused', 'failed') OR (other.state = 'completed' AND other.rowid > r.rowid)))
    AND NOT EXISTS (SELECT 1 FROM releases WHERE target = r.target AND withdrawn IS NOT NULL) ORDER BY created, id
"""


def tally_of(rows: Sequence[Row]) -> Tally:
    """Return the counts of rows of state, number and last word."""
    counts = dict.fromkeys(("queued", "sent", "running", "succeeded", "failed", "canceled"), 0)
    for row in rows:
        if row["state"] in counts:
            counts[row["state"]] += row["n"]
    return Tally(**counts, heard=max((row["heard"] for row in rows), default=0.0))


def rollout_of(row: Row) -> Rollout:
    """Return a rollout."""
    return Rollout(
        id=row["id"],
        model=row["model"],
        release=row["release"],
        target=row["target"],
        length=row["length"],
        digest=row["digest"],
        counter=row["counter"],
        audience=msgspec.json.decode(row["audience"], type=Audience),
        options=msgspec.json.decode(row["options"], type=Options),
        plan=msgspec.json.decode(row["plan"], type=Plan),
        progress=msgspec.json.decode(row["progress"], type=Progress),
        attempt=row["attempt"],
        created=row["created"],
        actor=row["actor"],
    )


def member_of(row: Row) -> Member:
    """Return a member."""
    return Member(
        row["device"],
        row["wave"],
        row["state"],
        row["job"],
        row["reported"],
        row["percent"],
        row["code"],
        row["detail"],
        row["heard"],
    )


def device_job_of(row: Row) -> DeviceJob:
    """Return a device's job."""
    return DeviceJob(row["device"], row["version"], row["document"])


def text_of(value: object) -> str:
    """Return what a column keeps of a value."""
    return msgspec.json.encode(value).decode()
