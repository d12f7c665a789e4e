"""What the rooms' tables have in common: ids for the public, one row by its id, and lists in pages."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.core.errors import NotFoundError
from appliance.store.database import Connection, Row

_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    """Return the prefix and 24 random letters and digits."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def one(connection: Connection, sql: str, values: Sequence[object] | Mapping[str, object], what: str) -> Row:
    """Return the one row. Raises NotFoundError, naming `what`."""
    row: Row | None = connection.execute(sql, values).fetchone()
    if row is None:
        raise NotFoundError(f"There is no {what}.", advice="List what there is; ids are those of this API key alone.")
    return row


def page(
    connection: Connection, sql: str, values: Mapping[str, Any], *, limit: int, newest_first: bool, key: str
) -> tuple[list[Row], bool]:
    """Return up to `limit` rows of a list that is in the order of a key, and whether there are more.

    Args:
        connection: To read with.
        sql: A SELECT that ends with its conditions, of which there is one at least.
        values: Its parameters; `after` is the key of the row before the page, or None.
        limit: Most rows.
        newest_first: The order.
        key: The key's column.
    """
    order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
    after = f" AND {key} {sign} :after" if values["after"] is not None else ""
    rows = connection.execute(f"{sql}{after} ORDER BY {key} {order} LIMIT :limit", {**values, "limit": limit + 1})
    found = rows.fetchall()
    return found[:limit], len(found) > limit
