"""Rows to write and read back: the audit's table takes any text and keeps the order."""

from __future__ import annotations

from appliance.store.database import Connection


def note(connection: Connection, subject: str) -> int:
    insert = "INSERT INTO audit (at, actor, action, subject, detail) VALUES (0, 'test', 'note', ?, '')"
    return connection.execute(insert, (subject,)).rowcount


def subjects(connection: Connection) -> list[str]:
    return [row["subject"] for row in connection.execute("SELECT subject FROM audit ORDER BY id")]
