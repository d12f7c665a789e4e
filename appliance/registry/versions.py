"""The registered models: what this box has, as every process that shares its data folder sees it.

Each question asks the database, so that a running server knows at once what the command line added or removed; the
answer is read anew where SQLite says that someone has written since. What a process has loaded it holds
(`Registry.hold`), and what anyone holds is not removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import msgspec

from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.settings import Settings
from appliance.core.tensors import ModelSignature
from appliance.core.wishes import Wish
from appliance.registry.blobs import Blobs
from appliance.registry.known import Known, ModelFile, RegisteredModel
from appliance.registry.roles import ADAPTER, MODEL
from appliance.registry.rows import (
    delete_adapter,
    delete_model,
    files_of,
    find_files,
    insert_adapter,
    insert_model,
    is_name_taken,
    select_all,
)
from appliance.registry.wish_rows import keep_meaning, release_version, select_wishes
from appliance.security.audit import local_actor, record
from appliance.store.database import Connection, Database, Row
from appliance.store.locks import Hold


class Registry:
    """The tables `models`, `model_files` and `adapters`, and the blobs they name."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self.blobs = blobs

    def known(self) -> Known:
        """Return everything as it is now: for whoever asks more than one question of it, or asks often."""
        return self._database.read_kept(self._all)

    def list(self) -> list[RegisteredModel]:
        """Return every registered model, oldest first, each with its adapters behind it, oldest first too."""
        return [*self.known().models]

    def wishes(self) -> Mapping[str, Wish]:
        """Return by its short name which version of a model is wished for, where one is."""
        return self.known().wishes

    def resolve(self, name: str) -> RegisteredModel:
        """Return the model or adapter of that name, see `registry.known`.

        Raises:
            NotFoundError: There is none; the message names those that exist.
        """
        return self.known().resolve(name)

    def _all(self, connection: Connection) -> Known:
        listed: list[RegisteredModel] = []
        models, adapters = select_all(connection)
        for row in models:
            model = self._model(row)
            listed.append(model)
            listed += [self._adapter(each, model) for each in adapters if each["base_id"] == row["id"]]
        return Known(tuple(listed), select_wishes(connection))

    def registered(
        self, name: str, version: str, digests: Mapping[str, str], *, adapter: str = ""
    ) -> RegisteredModel | None:
        """Return the model or adapter of just these files that has the name, or None if nothing has.

        Args:
            name: Of the model.
            version: Of the model.
            digests: The hash of each file by its role.
            adapter: The adapter's own name, or "".

        Raises:
            ConflictError: Other files have that name, or an adapter has the version's name, or a version the adapter's.
        """
        for model in self.list():
            if model.name == name and adapter and model.base_name == f"{name}:{adapter}":
                raise _version_and_adapter(name, adapter)
            if model.name == name and not adapter and model.adapter == version:
                raise _version_and_adapter(name, version)
            if (model.name, model.version, model.adapter) == (name, version, adapter):
                if model.digests != digests:
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

    def register(self, model: RegisteredModel, origin: str, *, aside: bool = False) -> RegisteredModel:
        """Make a model known, in one transaction with its audit row. The caller holds its files, checked.

        Args:
            model: What to register.
            origin: Where its files came from, for the audit.
            aside: Whether its short name goes on meaning what it means; the first version is always meant.

        Returns:
            The model as it is registered: the old one if the very same files had that name and version already.

        Raises:
            ConflictError: Other files have that name and version, or a version and an adapter would have one name.
            NotFoundError: The adapter's base was removed meanwhile.
        """
        actor = local_actor()

        def insert(connection: Connection) -> bool:
            if (present := find_files(connection, model)) is not None:
                if present != {each.role: (each.sha256, each.size) for each in model.files}:
                    raise _other_files(model.full_name)
                return False
            if is_name_taken(connection, model):
                raise _version_and_adapter(model.name, model.adapter or model.version)
            if aside and not model.adapter:
                keep_meaning(connection, model.name, actor)
            (insert_adapter if model.adapter else insert_model)(connection, model)
            record(connection, actor, "model.register", model.full_name, {"origin": origin, "files": model.digests})
            return True

        return model if self._database.write_blocking(insert) else self.resolve(model.full_name)

    def remove(self, name: str) -> tuple[RegisteredModel, int]:
        """Remove a model or an adapter, and the files that no other uses.

        Returns:
            The model that was removed, and how many bytes that freed.

        Raises:
            NotFoundError: There is none of that name.
            ConflictError: A process has it loaded, it is the base of adapters, or its name means it by a wish, or would
                after the way back.
        """
        model = self.resolve(name)
        actor = local_actor()

        def delete(connection: Connection) -> None:
            if not model.adapter:
                release_version(connection, model.name, model.version)
            if not (delete_adapter if model.adapter else delete_model)(connection, model):
                raise NotFoundError(f"The model {model.full_name} was removed by someone else just now.")
            record(connection, actor, "model.remove", model.full_name)

        with self.blobs.exclusively(self._own(model)):
            self._database.write_blocking(delete)
        return model, self.remove_unused_files()

    def _own(self, model: RegisteredModel) -> set[str]:
        """Return the hashes of a model's main file, and of those that no other model has, as it may a tokenizer."""
        others = [each for each in self.list() if each.full_name != model.full_name]
        shared = {each.sha256 for other in others for each in other.files}
        return {each.sha256 for each in model.files if each.role in (MODEL, ADAPTER) or each.sha256 not in shared}

    def remove_unused_files(self) -> int:
        """Delete files that no model uses, such as a crash leaves behind, and return the bytes this freed."""
        return self.blobs.remove_unused(self._is_used)

    def _is_used(self, sha256: str) -> bool:
        def count(connection: Connection) -> bool:
            found = connection.execute(
                "SELECT 1 FROM model_files WHERE sha256 = ? UNION SELECT 1 FROM adapters WHERE sha256 = ?",
                (sha256, sha256),
            )
            return found.fetchone() is not None

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
                for role, (sha256, size) in sorted(files_of(row).items())
            ),
            architecture=row["architecture"],
            quantisation=row["quantisation"],
            context_length=row["context_length"],
            minimum_memory=row["minimum_memory"],
            chat_template=row["chat_template"],
            stop=tuple(msgspec.json.decode(row["stop"], type=list[str])),
            default_context=row["default_context"],
            signature=msgspec.json.decode(row["signature"], type=ModelSignature) if row["signature"] else None,
        )

    def _adapter(self, row: Row, base: RegisteredModel) -> RegisteredModel:
        return replace(
            base,
            kind="lora",
            licence=row["licence"],
            created=row["created"],
            files=(ModelFile("adapter", self.blobs.path(row["sha256"]), row["sha256"], row["size"]),),
            quantisation=row["quantisation"],
            minimum_memory=row["minimum_memory"],
            adapter=row["name"],
            rank=row["rank"],
        )


def open_registry(settings: Settings, database: Database) -> Registry:
    """Return the registry of this box's data folder."""
    return Registry(database, Blobs(settings.blobs_dir))


def _other_files(full_name: str) -> ConflictError:
    return ConflictError(
        f"There is a model {full_name} already, with other files; nothing was changed.",
        advice=f"Choose another version, or remove that one first: appliance models remove {full_name}",
        code="model_exists",
    )


def _version_and_adapter(name: str, shared: str) -> ConflictError:
    return ConflictError(
        f"{name}:{shared} would mean both a version and an adapter of {name}; nothing was changed.",
        advice=f"Choose another name for the new one, or remove the old one: appliance models remove {name}:{shared}",
        code="model_exists",
    )
