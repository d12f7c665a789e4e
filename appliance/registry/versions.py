"""The registered models: what this box has, as every process that shares its data folder sees it.

A LoRA adapter belongs to one version of one model, its base. Names are resolved without ambiguity:

    base                   the version that is wished for (`wishes`), else the one registered last
    base:version           that version
    base:adapter           the adapter of that version, else of the one registered last that has one of that name
    base:version:adapter   that adapter

since a version and an adapter of one base never have the same name.

Each question asks the database, so that a running server knows at once what the command line added or removed; the
answer is read anew where SQLite says that someone has written since. What a process has loaded it holds
(`Registry.hold`), and what anyone holds is not removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import msgspec

from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.settings import Settings
from appliance.core.tensors import ModelSignature
from appliance.core.wishes import Wish
from appliance.registry.blobs import Blobs
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
from appliance.registry.trial import Trial, meant_version
from appliance.registry.wish_rows import keep_meaning, release_version, select_wishes
from appliance.security.audit import local_actor, record
from appliance.store.database import Connection, Database, Row
from appliance.store.locks import Hold


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model: what it is for, where it is, and what its bytes are.

    Attributes:
        role: `model` is the one that the engine loads, `adapter` an adapter; any other file of a model has its relative
            path in the model's folder as its role, for example `1_Pooling/config.json`.
        path: A read-only file named after its hash.
        size: Bytes.
    """

    role: str
    path: Path
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """A model on this box, or an adapter; of an adapter everything that is not said to be its own is its base's.

    Attributes:
        kind: `gguf` is a model for text, `lora` an adapter in the same file format, `onnx` a model of tensors.
        task: What it is for: `chat`, `completion` or `embedding`; of the kind `onnx` `embedding`, `rerank`,
            `classification` or, where only tensors are known, `tensor`.
        licence: SPDX licence expression; an adapter's own.
        created: Unix seconds of registration; an adapter's own.
        files: An adapter's own.
        architecture: As its files say, for example `llama`.
        quantisation: For example `Q4_1` or `int8`; an adapter's own.
        context_length: Tokens it was trained for, 0 for a model of the kind `onnx` that does not say.
        minimum_memory: Bytes the process needs with it loaded; an adapter's come on top of its base's.
        chat_template: Replaces the one in the file; None keeps that.
        stop: Strings that end an answer.
        default_context: Tokens of a conversation, or None for `context_length`.
        adapter: The adapter's name, or "" for a model.
        rank: The adapter's rank, or 0 for a model.
        signature: What a model of the kind `onnx` takes and gives; None for the others.
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
    adapter: str = ""
    rank: int = 0
    signature: ModelSignature | None = None

    @property
    def full_name(self) -> str:
        """Return `name:version`, or `name:version:adapter`."""
        return f"{self.base_name}:{self.adapter}" if self.adapter else self.base_name

    @property
    def base_name(self) -> str:
        """Return `name:version`, which of an adapter is its base's full name."""
        return f"{self.name}:{self.version}"

    @property
    def names(self) -> tuple[str, str]:
        """Return the short name and the full one."""
        return (f"{self.name}:{self.adapter}" if self.adapter else self.name, self.full_name)

    @property
    def size(self) -> int:
        """Return the bytes of all files together."""
        return sum(each.size for each in self.files)

    @property
    def digests(self) -> dict[str, str]:
        """Return the hash of each file by its role."""
        return {each.role: each.sha256 for each in self.files}

    def file(self, role: str) -> ModelFile | None:
        """Return the file of that role, or None."""
        return next((each for each in self.files if each.role == role), None)


@dataclass(frozen=True, slots=True)
class _Known:
    """What was read at once."""

    models: tuple[RegisteredModel, ...]
    wishes: Mapping[str, Wish]


class Registry:
    """The tables `models`, `model_files` and `adapters`, and the blobs they name."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._read: dict[int, tuple[int, _Known]] = {}
        self.blobs = blobs

    def list(self) -> list[RegisteredModel]:
        """Return every registered model, oldest first, each with its adapters behind it, oldest first too."""
        return [*self._database.read(self._all).models]

    def wishes(self) -> Mapping[str, Wish]:
        """Return by its short name which version of a model is wished for, where one is."""
        return self._database.read(self._all).wishes

    def _all(self, connection: Connection) -> _Known:
        """Read everything, unless this connection has read it and nothing was written since, by whatever process."""
        version: int = connection.execute("PRAGMA data_version").fetchone()[0]  # counted by each connection for itself
        known = self._read.get(id(connection))
        if known is not None and known[0] == version:
            return known[1]
        listed: list[RegisteredModel] = []
        models, adapters = select_all(connection)
        for row in models:
            model = self._model(row)
            listed.append(model)
            listed += [self._adapter(each, model) for each in adapters if each["base_id"] == row["id"]]
        self._read[id(connection)] = version, _Known(tuple(listed), select_wishes(connection))
        return self._read[id(connection)][1]

    def resolve(self, name: str) -> RegisteredModel:
        """Return the model or adapter of that name, see this module's docstring.

        Raises:
            NotFoundError: There is none; the message names those that exist.
        """
        known = self._database.read(self._all)
        return find_model(known.models, name, known.wishes)

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


def find_model(
    models: Sequence[RegisteredModel], name: str, wishes: Mapping[str, Wish] = MappingProxyType({})
) -> RegisteredModel:
    """Return the model or adapter that has this full name, or the one that this short name means.

    Raises:
        NotFoundError: There is none; the message names those that exist.
    """
    wanted = name if any(each.full_name == name for each in models) else find_meant(models, name, wishes)
    for model in models:
        if model.full_name == wanted:
            return model
    known = ", ".join(each.full_name for each in models)
    raise NotFoundError(
        f"There is no model {name!r:.100}; " + (f"there are: {known}." if known else "there is none at all yet."),
        advice="`appliance models catalog` lists what can be had, `appliance models pull NAME` gets it.",
        code="model_not_found",
        param="model",
    )


def find_meant(models: Sequence[RegisteredModel], name: str, wishes: Mapping[str, Wish]) -> str | None:
    """Return the full name of the model or adapter that a short name means, or None if it means none."""
    named = {each.version: each for each in models if each.names[0] == name}
    if not named:
        return None
    meant = meant_version(_trial(wishes.get(next(iter(named.values())).name)), list(named))
    return None if meant is None else named[meant].full_name


def _trial(wish: Wish | None) -> Trial | None:
    return None if wish is None else Trial(wish.version, wish.previous, wish.state)


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
