"""The rows of `models`, `model_files` and `adapters`: what the registry reads and writes inside its transactions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from appliance.core.errors import ConflictError, NotFoundError
from appliance.store.database import Connection, Row

if TYPE_CHECKING:
    from appliance.registry.known import RegisteredModel

_SELECT = """
    SELECT models.*, (
        SELECT json_group_object(role, json_array(sha256, size)) FROM model_files WHERE model_id = models.id
    ) AS files
    FROM models
"""

_SELECT_ADAPTER = """
    SELECT adapters.* FROM adapters JOIN models ON models.id = base_id WHERE models.name = ? AND models.version = ?
"""


def select_all(connection: Connection) -> tuple[list[Row], list[Row]]:
    """Return the rows of all models with their files, and those of all adapters, oldest first."""
    return (
        connection.execute(f"{_SELECT} ORDER BY id").fetchall(),
        connection.execute("SELECT * FROM adapters ORDER BY id").fetchall(),
    )


def find_files(connection: Connection, model: RegisteredModel) -> Mapping[str, tuple[str, int]] | None:
    """Return the hash and size by role of what is registered under the model's full name, or None if nothing is."""
    named = (model.name, model.version)
    if not model.adapter:
        row = connection.execute(f"{_SELECT} WHERE name = ? AND version = ?", named).fetchone()
        return None if row is None else files_of(row)
    row = connection.execute(f"{_SELECT_ADAPTER} AND adapters.name = ?", (*named, model.adapter)).fetchone()
    return None if row is None else {"adapter": (row["sha256"], row["size"])}


def is_name_taken(connection: Connection, model: RegisteredModel) -> bool:
    """Return True if an adapter of any version is called as this version, or a version as this adapter."""
    if model.adapter:
        query, named = "SELECT 1 FROM models WHERE name = ? AND version = ?", (model.name, model.adapter)
    else:
        query = "SELECT 1 FROM adapters JOIN models ON models.id = base_id WHERE models.name = ? AND adapters.name = ?"
        named = (model.name, model.version)
    return connection.execute(query, named).fetchone() is not None


def delete_model(connection: Connection, model: RegisteredModel) -> int:
    """Delete a model; return 0 if there is none, else 1.

    Raises:
        ConflictError: It is the base of adapters.
    """
    named = (model.name, model.version)
    adapters = [str(row["name"]) for row in connection.execute(f"{_SELECT_ADAPTER} ORDER BY adapters.id", named)]
    if adapters:
        raise ConflictError(
            f"{model.full_name} is the base of {len(adapters)} adapters: {', '.join(adapters):.300}; "
            "nothing was removed.",
            advice=f"Remove them first: appliance models remove {model.full_name}:{adapters[0]}",
            code="model_in_use",
        )
    return connection.execute("DELETE FROM models WHERE name = ? AND version = ?", named).rowcount


def delete_adapter(connection: Connection, model: RegisteredModel) -> int:
    """Delete an adapter; return 0 if there is none, else 1."""
    return connection.execute(
        "DELETE FROM adapters WHERE name = ? AND base_id = (SELECT id FROM models WHERE name = ? AND version = ?)",
        (model.adapter, model.name, model.version),
    ).rowcount


def files_of(row: Row) -> Mapping[str, tuple[str, int]]:
    """Return each file's hash and size by its role."""
    return msgspec.json.decode(row["files"], type=dict[str, tuple[str, int]])


def insert_model(connection: Connection, model: RegisteredModel) -> None:
    """Insert a model and its files."""
    inserted = connection.execute(
        """
        INSERT INTO models (name, version, kind, task, licence, created, architecture, quantisation, context_length,
            minimum_memory, chat_template, stop, default_context, signature)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            model.name,
            model.version,
            model.kind,
            model.task,
            model.licence,
            model.created,
            model.architecture,
            model.quantisation,
            model.context_length,
            model.minimum_memory,
            model.chat_template,
            msgspec.json.encode(model.stop).decode(),
            model.default_context,
            None if model.signature is None else msgspec.json.encode(model.signature).decode(),
        ),
    )
    connection.executemany(
        "INSERT INTO model_files (model_id, role, sha256, size) VALUES (?, ?, ?, ?)",
        [(inserted.lastrowid, each.role, each.sha256, each.size) for each in model.files],
    )


def insert_adapter(connection: Connection, model: RegisteredModel) -> None:
    """Insert an adapter.

    Raises:
        NotFoundError: There is no such base any more.
    """
    (file,) = model.files
    inserted = connection.execute(
        """
        INSERT INTO adapters (base_id, name, licence, created, quantisation, rank, minimum_memory, sha256, size)
        SELECT id, ?, ?, ?, ?, ?, ?, ?, ? FROM models WHERE name = ? AND version = ?
        """,
        (
            model.adapter,
            model.licence,
            model.created,
            model.quantisation,
            model.rank,
            model.minimum_memory,
            file.sha256,
            file.size,
            model.name,
            model.version,
        ),
    )
    if not inserted.rowcount:
        raise NotFoundError(
            f"The base {model.base_name} was removed meanwhile; nothing was changed.",
            advice="Pull or import it again, then the adapter.",
            code="model_not_found",
            param="model",
        )
