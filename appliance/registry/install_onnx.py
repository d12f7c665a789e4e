"""How an ONNX model of one or several files comes in; the journeys are those of `install`.

pull:   the other files ⇒ blobs → the graph ⇒ checked with all of them → blob → register
import: folder → checked → copies of all files → checked again → blobs → register
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from appliance.core.clock import Clock, SystemClock
from appliance.core.errors import InvalidRequestError, ModelFileError
from appliance.registry.blobs import Partial
from appliance.registry.files import Progress, no_progress, sha256_of, storage_errors
from appliance.registry.install import PROGRAM_BYTES, Installed
from appliance.registry.known import ModelFile, RegisteredModel
from appliance.registry.manifest import Manifest, check_licence
from appliance.registry.naming import checked_name, licence_of, name_from, version_of
from appliance.registry.onnx_folder import OnnxModel, find_companions, find_external, read_model
from appliance.registry.onnx_graph import find_graph
from appliance.registry.onnx_header import read_onnx
from appliance.registry.roles import MODEL
from appliance.registry.sources import local
from appliance.registry.transfer import Transfer
from appliance.registry.versions import Registry

ONNXRUNTIME_BYTES = 35_000_000
"""What onnxruntime needs before it has a model."""

GROWTH = 4
GROWTH_OF_SMALL_TYPES = 8
"""Bytes of memory for each byte of a model's files: its weights and what they are laid out as for the CPU, where 8 bits
and fewer grow. 2.5 to 4 were measured with models in fp32, 7.4 with all-MiniLM-L6-v2 in int8."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a model is registered as; `licence` replaces what its file says."""

    name: str
    version: str
    licence: str
    created: int


def obtain(manifest: Manifest, transfer: Transfer, only_source: str | None, created: int) -> RegisteredModel:
    """Fetch a manifest's files, and return the model to be registered. Raises as `install.pull`."""
    blobs = transfer.registry.blobs
    others = {each.role: blobs.path(each.sha256) for each in manifest.files if each.role != MODEL}
    model = None
    for file in sorted(manifest.files, key=lambda each: each.role == MODEL):  # the graph is checked with the others
        if file.role == MODEL:
            check = functools.partial(_read_for_manifest, manifest=manifest, files=others)
            model = transfer.obtain(file, transfer.sources_of(file, only_source), check)
        else:
            transfer.obtain(file, transfer.sources_of(file, only_source), lambda _: None)
    assert model is not None, "a manifest of the kind 'onnx' has one graph"
    files = tuple(ModelFile(each.role, blobs.path(each.sha256), each.sha256, each.size) for each in manifest.files)
    identity = Identity(manifest.name, manifest.version, manifest.licence, created)
    return registered_as(identity, model, files, manifest.minimum_memory)


def _read_for_manifest(path: Path, manifest: Manifest, files: dict[str, Path]) -> OnnxModel:
    try:
        return read_model(path, files, manifest.task)
    except InvalidRequestError as error:
        raise ModelFileError(f"{manifest.full_name}: {error.message}", advice="Correct its manifest.") from error


def import_onnx(
    path: Path,
    registry: Registry,
    *,
    file: str | None = None,
    name: str | None = None,
    version: str | None = None,
    licence: str | None = None,
    task: str | None = None,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> Installed:
    """Copy an ONNX model in and register it.

    Args:
        path: The graph's file, which comes with its data files alone, or a folder with all files of the model.
        registry: Where to.
        file: Path of the graph inside the folder, where there is more than one.
        name: None is made from the folder's or the file's name.
        version: None is 1, or one more than the highest number there is.
        licence: SPDX licence expression; None is what the file says.
        task: `embedding`, `rerank`, `classification` or `tensor`; None is what the files say.
        progress: Told of every long step.
        clock: For the time of registration.

    Raises:
        InvalidRequestError: A name, version, licence or task that cannot be, or a folder without just one model.
        NotFoundError: There is no such file.
        ModelFileError: A file is damaged, hostile or missing; nothing is kept.
        StorageError: The disk is too full.
        ConflictError: Other files have that name and version.
    """
    name = checked_name("name", name or name_from(path))
    version = checked_name("version", version) if version else None
    licence = check_licence(licence) if licence else None
    with Copies(path, registry, file, progress) as copies:
        model, digests = copies.take(task)
        version = version or version_of(registry, name, digests)
        known = registry.registered(name, version, digests)
        if known and all(registry.blobs.has(each.sha256, each.size) for each in known.files):
            return Installed(known, was_present=True)
        files = copies.publish(digests)
        identity = Identity(
            name, version, licence or licence_of(model.header.licence), int((clock or SystemClock()).unix())
        )
        growth = GROWTH_OF_SMALL_TYPES if model.header.label in ("int8", "int4") else GROWTH
        memory = growth * sum(each.size for each in files) + ONNXRUNTIME_BYTES + PROGRAM_BYTES
        registered = registered_as(identity, model, files, memory)
        return Installed(registry.register(registered, f"import of {path}"), was_present=False)


class Copies:
    """A folder's model, copied beside the blobs, checked, and not yet published. A context manager."""

    def __init__(self, path: Path, registry: Registry, file: str | None, progress: Progress = no_progress) -> None:
        self.graph = find_graph(path, file)
        self._registry = registry
        self._progress = progress
        self._stack = ExitStack()
        self._partials: dict[str, Partial] = {}
        self._sources = find_companions(path, self.graph)
        external = find_external(self.graph, read_onnx(self.graph))
        if shared := sorted(self._sources.keys() & external.keys()):
            raise ModelFileError(f"The ONNX model keeps data in {shared[0]!r}, which is another file's name.")
        self._sources |= external

    def take(self, task: str | None) -> tuple[OnnxModel, dict[str, str]]:
        """Copy the files; return what they say, and the hash of each by its role. Raises as `install.import_model`."""
        read_model(self.graph, self._sources, task)  # before the long copy
        sources = self._sources | {MODEL: self.graph}
        sizes = {role: _size(path) for role, path in sources.items()}
        self._registry.blobs.remove_stale_partials()
        self._registry.blobs.require_space(sum(sizes.values()), f"import {self.graph.name}")
        digests = {}
        for role, path in sources.items():
            copy = self._partials[role] = self._stack.enter_context(self._registry.blobs.unnamed_partial())
            local.copy(path, copy, sizes[role], progress=self._progress)
            with storage_errors(copy.path):
                digests[role] = sha256_of(copy.file, self._progress)
        copies = {role: copy.path for role, copy in self._partials.items()}
        graph = copies.pop(MODEL)
        return read_model(graph, copies, task), digests

    def publish(self, digests: dict[str, str]) -> tuple[ModelFile, ...]:
        """Make the copies blobs, which stay until this is left."""
        files = []
        for role, copy in sorted(self._partials.items()):
            size = copy.size
            copy.publish(digests[role])
            files.append(ModelFile(role, self._registry.blobs.path(digests[role]), digests[role], size))
        return tuple(files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def registered_as(
    identity: Identity, model: OnnxModel, files: tuple[ModelFile, ...], minimum_memory: int
) -> RegisteredModel:
    """Return the model as it is to be registered."""
    return RegisteredModel(
        name=identity.name,
        version=identity.version,
        kind="onnx",
        task=model.purpose.task,
        licence=identity.licence,
        created=identity.created,
        files=tuple(sorted(files, key=lambda each: each.role)),
        architecture=model.purpose.architecture,
        quantisation=model.header.label,
        context_length=model.purpose.context_length,
        minimum_memory=minimum_memory,
        chat_template=None,
        stop=(),
        default_context=None,
        signature=model.header.signature,
    )


def _size(path: Path) -> int:
    with storage_errors(path):
        size = path.stat().st_size
    if not size:
        raise ModelFileError(f"The file {path} is empty.", advice="Fetch it again, or take it out of the folder.")
    return size
