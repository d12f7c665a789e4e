"""The append-only record of who changed what, written in the same transaction as the change itself.

The database refuses to update or delete a row of `audit`, so a mistake in this program cannot rewrite the past. Someone
with the file in hand can: this is a record for the honest operator, not proof against root.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Mapping

import msgspec

from appliance.store.database import Connection


def record(
    connection: Connection,
    actor: str,
    action: str,
    subject: str,
    detail: Mapping[str, object] | None = None,
    *,
    at: float | None = None,
) -> None:
    """Append one row; call it inside the transaction of the change, so that both happen or neither.

    Args:
        connection: As handed to the function given to `Database.write`.
        actor: The API key's id, or `local_actor()` on the command line.
        action: `noun.verb` in the present, such as `key.create` or `model.remove`.
        subject: What was changed: an id or a full name.
        detail: Further facts for a person; stored as JSON. Never a secret.
        at: Seconds since 1970; None is now.
    """
    connection.execute(
        "INSERT INTO audit (at, actor, action, subject, detail) VALUES (?, ?, ?, ?, ?)",
        (
            time.time() if at is None else at,
            actor,
            action,
            subject,
            msgspec.json.encode(dict(detail or {}), enc_hook=str).decode(),
        ),
    )


def local_actor() -> str:
    """Return who runs this process, such as `local:alice`; after `sudo` it is `local:root`."""
    try:
        return f"local:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:  # a container may run under a number that has no name
        return f"local:{os.getuid()}"
