"""Devices that leave rollouts, or are there anew, inside the caller's transaction.

The version of a device's job only ever rises, so its row stays: the box may come back and remember it.
"""

from __future__ import annotations

from appliance.store.database import Connection


def leave(connection: Connection, device: str, now: float) -> None:
    """Take a device out of every rollout: one of its id that comes later is a newcomer."""
    _forget_reports(connection, device)
    connection.execute("DELETE FROM members WHERE device = ?", (device,))
    connection.execute("UPDATE device_jobs SET over = 1, published = ? WHERE device = ?", (now, device))


def begin_anew(connection: Connection, device: str) -> None:
    """Let a device have its releases again: it is a new installation, and has none of what the one before had."""
    _forget_reports(connection, device)
    connection.execute(
        "DELETE FROM members WHERE device = ? AND rollout IN "
        "(SELECT id FROM rollouts WHERE state IN ('completed', 'aborted'))",
        (device,),
    )
    connection.execute(
        "UPDATE members SET state = 'queued', job = '', reported = '', percent = 0, code = '', detail = '', "
        "heard = NULL WHERE device = ?",
        (device,),
    )


def _forget_reports(connection: Connection, device: str) -> None:
    """Forget what was reported: the sequence of a new installation begins anew, and is not a repetition."""
    connection.execute("DELETE FROM job_reports WHERE device = ?", (device,))
