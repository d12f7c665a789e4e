"""The registered models: what this box has, as every process that shares its data folder sees it.

Nothing is kept in memory: each question reads the database, so that a running server knows at once what the command
line added or removed. What a process has loaded it holds (`Registry.hold`), and what anyone holds is not removed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.settings import Settings
from appliance.registry.blobs import Blobs
from appliance.security.audit import local_actor, record
from appliance.store.database import Connection, Database, Row
from appliance.store.locks import Hold


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model: what it is for, where it is, and what its bytes are.

    Attributes:
        role: `model` is the one that the engine loads.
        path: A read-only file named after its hash.
        size: Bytes.
    """

    role: str
    path: Path
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """A model on this box.

    Attributes:
        kind: The file format, `gguf`.
        task: What it is for: `chat`, `completion` or `embedding`.
        licence: SPDX licence expression.
        created: Unix seconds of registration.
        architecture: As its file says, for example `llama`.
        quantisation: For example `Q4_1`.
        context_length: Tokens it was trained for.
        minimum_memory: Bytes the process needs with it loaded.
        chat_template: Replaces the one in the file; None keeps that.
        stop: Strings that end an answer.
        default_context: Tokens of a conversation, or None for `context_length`.
    """

    name: str
    version: str
    kind: str
    task: str
    licence: str
    created: int
    files: tuple[ModelFile, ...]
    architecture: str
    quantisation: str
    context_length: int
    minimum_memory: int
    chat_template: str | None
    stop: tuple[str, ...]
    default_context: int | None

    @property
    def full_name(self) -> str:
        """Return `name:version`."""
        return f"{self.name}:{self.version}"

    @property
    def size(self) -> int:
        """Return the bytes of all files together."""
        return sum(each.size for each in self.files)


class Registry:
    """The tables `models` and `model_files`, and the blobs they name."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self.blobs = blobs

    def list(self) -> list[RegisteredModel]:
        """Return every registered model, oldest first."""
        return [self._model(row) for row in self._database.read(_select_all)]

    def resolve(self, name: str) -> RegisteredModel:
        """Return the model called `name:version`, or the newest registered version of the one called `name`.

        Raises:
            NotFoundError: There is none; the message names those that exist.
        """
        return find_model(self.list(), name)

    def registered(self, name: str, version: str, digests: Collection[str]) -> RegisteredModel | None:
        """Return the model of just these files that has the name and version, or None if nothing has.

        Raises:
            ConflictError: Other files have that name and version.
        """
        for model in self.list():
            if (model.name, model.version) == (name, version):
                if {each.sha256 for each in model.files} != set(digests):
                    raise _other_files(model.full_name)
                return model
        return None

    def hold(self, model: RegisteredModel) -> Hold:
        """Keep the model's files from being removed until the hold is closed or the process ends.

        Raises:
            NotFoundError: It has been removed meanwhile.
            ConflictError: It is being removed just now.
        """
        with ExitStack() as stack:
            hold = stack.enter_context(self.blobs.hold(each.sha256 for each in model.files))
            self._check_unchanged(model)
            stack.pop_all()
        return hold

    def _check_unchanged(self, model: RegisteredModel) -> None:
        if self.resolve(model.full_name).files != model.files:
            raise NotFoundError(
                f"The files of the model {model.full_name} were exchanged meanwhile.",
                advice="Try again with the new ones.",
                code="model_not_found",
                param="model",
            )

    def register(self, model: RegisteredModel, origin: str) -> RegisteredModel:
        """Make a model known, in one transaction with its audit row. The caller holds its files, checked.

        Args:
            model: What to register.
            origin: Where its files came from, for the audit.

        Returns:
            The model as it is registered: the old one if the very same files had that name and version already.

        Raises:
            ConflictError: Other files have that name and version.
        """
        actor = local_actor()

        def insert(connection: Connection) -> bool:
            rows = connection.execute(f"{_SELECT} WHERE name = ? AND version = ?", (model.name, model.version))
            if present := rows.fetchone():
                if _digests(present) != {each.role: (each.sha256, each.size) for each in model.files}:
                    raise _other_files(model.full_name)
                return False
            _insert(connection, model)
            digests = {each.role: each.sha256 for each in model.files}
            record(connection, actor, "model.register", model.full_name, {"origin": origin, "files": digests})
            return True

        return model if self._database.write_blocking(insert) else self.resolve(model.full_name)

    def remove(self, name: str) -> tuple[RegisteredModel, int]:
        """Remove a model and the files that no other model uses.

        Returns:
            The model that was removed, and how many bytes that freed.

        Raises:
            NotFoundError: There is none of that name.
            ConflictError: A process has it loaded.
        """
        model = self.resolve(name)
        actor = local_actor()

        def delete(connection: Connection) -> None:
            name_and_version = (model.name, model.version)
            if not connection.execute("DELETE FROM models WHERE name = ? AND version = ?", name_and_version).rowcount:
                raise NotFoundError(f"The model {model.full_name} was removed by someone else just now.")
            record(connection, actor, "model.remove", model.full_name)

        with self.blobs.exclusively(each.sha256 for each in model.files):
            self._database.write_blocking(delete)
        return model, self.remove_unused_files()

    def remove_unused_files(self) -> int:
        """Delete files that no model uses, such as a crash leaves behind, and return the bytes this freed."""
        return self.blobs.remove_unused(self._is_used)

    def _is_used(self, sha256: str) -> bool:
        def count(connection: Connection) -> bool:
            return (
                connection.execute("SELECT 1 FROM model_files WHERE sha256 = ? LIMIT 1", (sha256,)).fetchone()
                is not None
            )

        return self._database.read(count)

    def _model(self, row: Row) -> RegisteredModel:
        return RegisteredModel(
            name=row["name"],
            version=row["version"],
            kind=row["kind"],
            task=row["task"],
            licence=row["licence"],
            created=row["created"],
            files=tuple(
                ModelFile(role, self.blobs.path(sha256), sha256, size)
                for role, (sha256, size) in sorted(_digests(row).items())
            ),
            architecture=row["architecture"],
            quantisation=row["quantisation"],
            context_length=row["context_length"],
            minimum_memory=row["minimum_memory"],
            chat_template=row["chat_template"],
            stop=tuple(msgspec.json.decode(row["stop"], type=list[str])),
            default_context=row["default_context"],
        )


def find_model(models: Sequence[RegisteredModel], name: str) -> RegisteredModel:
    """Return the model called `name:version`, or the last one called `name`.

    Raises:
        NotFoundError: There is none; the message names those that exist.
    """
    for model in reversed(models):
        if name in (model.name, model.full_name):
            return model
    known = ", ".join(each.full_name for each in models)
    raise NotFoundError(
        f"There is no model {name!r:.100}; " + (f"there are: {known}." if known else "there is none at all yet."),
        advice="`appliance models catalog` lists what can be had, `appliance models pull NAME` gets it.",
        code="model_not_found",
        param="model",
    )


def open_registry(settings: Settings, database: Database) -> Registry:
    """Return the registry of this box's data folder."""
    return Registry(database, Blobs(settings.blobs_dir))


_SELECT = """
    SELECT models.*, (
        SELECT json_group_object(role, json_array(sha256, size)) FROM model_files WHERE model_id = models.id
    ) AS files
    FROM models
"""


def _other_files(full_name: str) -> ConflictError:
    return ConflictError(
        f"There is a model {full_name} already, with other files; nothing was changed.",
        advice=f"Choose another version, or remove that one first: appliance models remove {full_name}",
        code="model_exists",
    )


def _select_all(connection: Connection) -> list[Row]:
    return connection.execute(f"{_SELECT} ORDER BY id").fetchall()


def _digests(row: Row) -> Mapping[str, tuple[str, int]]:
    """Return each file's hash and size by its role."""
    return msgspec.json.decode(row["files"], type=dict[str, tuple[str, int]])


def _insert(connection: Connection, model: RegisteredModel) -> None:
    inserted = connection.execute(
        """
        INSERT INTO models (name, version, kind, task, licence, created, architecture, quantisation, context_length,
            minimum_memory, chat_template, stop, default_context)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
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
        ),
    )
    connection.executemany(
        "INSERT INTO model_files (model_id, role, sha256, size) VALUES (?, ?, ?, ?)",
        [(inserted.lastrowid, each.role, each.sha256, each.size) for each in model.files],
    )
