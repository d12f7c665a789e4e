"""How a model or an adapter comes in: pulled by its manifest, or imported from a file.

    pull:   catalog entry → is it here? → sources in order ⇒ partial file → size and hash → header → blob → register
    import: file → header → copy ⇒ partial file → hash → header → blob → register

Everything before the registration can be cut off at any point: what was fetched is gone on with, what was not
registered is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from appliance.core.clock import Clock, SystemClock
from appliance.core.errors import InvalidRequestError, ModelFileError
from appliance.registry.blobs import Partial
from appliance.registry.catalog import CatalogEntry
from appliance.registry.files import Progress, no_progress, sha256_of, storage_errors
from appliance.registry.gguf_adapter import AdapterHeader, read_adapter
from appliance.registry.gguf_header import GGUFHeader, read_header
from appliance.registry.known import ModelFile, RegisteredModel
from appliance.registry.manifest import Manifest, check_licence
from appliance.registry.naming import checked_name, licence_of, name_from, version_of
from appliance.registry.roles import ADAPTER, MODEL
from appliance.registry.sources import local
from appliance.registry.transfer import Transfer
from appliance.registry.versions import Registry

PROGRAM_BYTES = 100_000_000
"""What the process needs beside a model's file and its KV cache; 85 MB were measured with the default model."""

KV_CELLS = 8192
"""KV cells that `minimum_memory` of an imported model counts with; the default of the setting `context_cells`."""

T = TypeVar("T")

_SPLIT_NAME = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.gguf", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Installed:
    """A registered model, and whether it was here before."""

    model: RegisteredModel
    was_present: bool


def find_installed(entry: CatalogEntry, registry: Registry) -> RegisteredModel | None:
    """Return the registered model of a catalog entry if its files are all here.

    Raises:
        ConflictError: Other files are registered under its name and version.
    """
    manifest = entry.manifest
    digests = {each.role: each.sha256 for each in manifest.files}
    model = registry.registered(manifest.name, manifest.version, digests, adapter=manifest.adapter or "")
    if model and all(registry.blobs.has(each.sha256, each.size) for each in model.files):
        return model
    return None


def pull(
    entry: CatalogEntry,
    registry: Registry,
    *,
    stall_timeout_s: float,
    only_source: str | None = None,
    aside: bool = False,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> Installed:
    """Fetch a catalog entry's files and register the model; at once if it is here already.

    Args:
        entry: What to pull.
        registry: Where to.
        stall_timeout_s: Longest silence of a source before it is given up.
        only_source: An address, file or folder to take the files from instead of the manifest's sources.
        aside: Whether the short name goes on meaning what it means, see `Registry.register`.
        progress: Told of every long step.
        clock: For the time of registration.

    Raises:
        SourceError: No source could deliver; what came is kept for the next try.
        ModelFileError: The file is no sound model; nothing is kept.
        StorageError: The disk is too full, before or while it is written; what came is kept.
        ConflictError: Another process pulls the same, or other files are registered under the name and version.
        NotFoundError: The base of an adapter is not here.
    """
    manifest = entry.manifest
    if present := find_installed(entry, registry):
        return Installed(present, was_present=True)
    registry.blobs.remove_stale_partials()
    with ExitStack() as held:
        transfer = Transfer(registry, entry.folder, stall_timeout_s, progress, held)
        take = {"gguf": _pulled_model, "lora": _pulled_adapter, "onnx": _pulled_onnx}[manifest.kind]
        taken = take(manifest, transfer, only_source, _now(clock))
        model = registry.register(taken, only_source or "catalog", aside=aside)
        transfer.discard_archives()
        return Installed(model, was_present=False)


def _pulled_onnx(manifest: Manifest, transfer: Transfer, only_source: str | None, created: int) -> RegisteredModel:
    from appliance.registry import install_onnx  # noqa: PLC0415  (onnx takes 0.2 s, which GGUF has no use for)

    return install_onnx.obtain(manifest, transfer, only_source, created)


def _pulled_model(manifest: Manifest, transfer: Transfer, only_source: str | None, created: int) -> RegisteredModel:
    (file,) = manifest.files
    header = transfer.obtain(file, transfer.sources_of(file, only_source), read_header)
    if manifest.task == "chat" and not (manifest.defaults.template or header.chat_template):
        raise ModelFileError(
            f"{manifest.full_name} is for chat, but neither its file nor its manifest has a chat template.",
            advice="Add `template` under [defaults] in the manifest.",
        )
    return RegisteredModel(
        name=manifest.name,
        version=manifest.version,
        kind=manifest.kind,
        task=manifest.task,
        licence=manifest.licence,
        created=created,
        files=(ModelFile(file.role, transfer.registry.blobs.path(file.sha256), file.sha256, file.size),),
        architecture=header.architecture,
        quantisation=header.quantisation,
        context_length=header.context_length,
        minimum_memory=manifest.minimum_memory,
        chat_template=manifest.defaults.template,
        stop=manifest.defaults.stop,
        default_context=manifest.defaults.context,
    )


def _pulled_adapter(manifest: Manifest, transfer: Transfer, only_source: str | None, created: int) -> RegisteredModel:
    (file,) = manifest.files
    base = transfer.registry.resolve(manifest.base_name)
    transfer.held.enter_context(transfer.registry.hold(base))
    check = partial(read_adapter, base=base.files[0].path)
    header = transfer.obtain(file, transfer.sources_of(file, only_source), check)
    blob = ModelFile(file.role, transfer.registry.blobs.path(file.sha256), file.sha256, file.size)
    adapter = _adapter(base, header, blob, name=manifest.adapter or "", licence=manifest.licence, created=created)
    return replace(adapter, minimum_memory=manifest.minimum_memory)


def import_model(
    path: Path,
    registry: Registry,
    *,
    name: str | None = None,
    version: str | None = None,
    licence: str | None = None,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> Installed:
    """Copy a GGUF file in and register it.

    Args:
        path: The file, or a folder that holds just one.
        registry: Where to.
        name: None is made from the file's name.
        version: None is 1, or one more than the highest number there is.
        licence: SPDX licence expression; None is what the file says.
        progress: Told of every long step.
        clock: For the time of registration.

    Raises:
        InvalidRequestError: A name, version or licence that cannot be, or a folder without just one model.
        NotFoundError: There is no such file.
        ModelFileError: The file is no sound model; nothing is kept.
        StorageError: The disk is too full.
        ConflictError: Other files have that name and version.
    """
    path = _model_file(path)
    name = checked_name("name", name or name_from(path))
    version = checked_name("version", version) if version else None
    licence = check_licence(licence) if licence else None
    with _copied(path, registry, read_header, progress) as (copy, header, sha256):
        size = copy.size
        version = version or version_of(registry, name, {MODEL: sha256})
        known = registry.registered(name, version, {MODEL: sha256})
        if known and registry.blobs.has(sha256, size):
            return Installed(known, was_present=True)
        copy.publish(sha256)
        model = RegisteredModel(
            name=name,
            version=version,
            kind="gguf",
            task=_task_of(header),
            licence=licence or licence_of(header.licence),
            created=_now(clock),
            files=(ModelFile(MODEL, registry.blobs.path(sha256), sha256, size),),
            architecture=header.architecture,
            quantisation=header.quantisation,
            context_length=header.context_length,
            minimum_memory=_minimum_memory(header, size),
            chat_template=None,
            stop=(),
            default_context=None,
        )
        return Installed(registry.register(model, f"import of {path}"), was_present=False)


def import_adapter(
    path: Path,
    registry: Registry,
    *,
    base: str,
    name: str | None = None,
    licence: str | None = None,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> Installed:
    """Copy a LoRA adapter in and register it with its base.

    Args:
        path: The file, or a folder that holds just one.
        registry: Where to.
        base: The registered model that it was trained on, `name` or `name:version`.
        name: The adapter's own name; None is made from the file's name.
        licence: SPDX licence expression; None is what the file says.
        progress: Told of every long step.
        clock: For the time of registration.

    Raises:
        InvalidRequestError: A name or licence that cannot be, a base that is an adapter itself, or a folder without
            just one file.
        NotFoundError: There is no such file or base.
        ModelFileError: The file is no sound adapter, or not one for this base; nothing is kept.
        StorageError: The disk is too full.
        ConflictError: Other files have that name, or a version of the base has.
    """
    path = _model_file(path)
    name = checked_name("name", name or name_from(path))
    licence = check_licence(licence) if licence else None
    model = registry.resolve(base)
    if model.adapter:
        raise InvalidRequestError(
            f"{model.full_name} is an adapter itself.",
            advice=f"Name its base: --base {model.base_name}",
            param="base",
        )
    if model.task == "embedding":
        raise InvalidRequestError(
            f"{model.full_name} is for embeddings; adapters can be used with models for chat and completion.",
            param="base",
        )
    with (
        registry.hold(model),
        _copied(path, registry, partial(read_adapter, base=model.files[0].path), progress) as (copy, header, sha256),
    ):
        size = copy.size
        known = registry.registered(model.name, model.version, {ADAPTER: sha256}, adapter=name)
        if known and registry.blobs.has(sha256, size):
            return Installed(known, was_present=True)
        copy.publish(sha256)
        file = ModelFile(ADAPTER, registry.blobs.path(sha256), sha256, size)
        licence = licence or licence_of(header.licence)
        adapter = _adapter(model, header, file, name=name, licence=licence, created=_now(clock))
        return Installed(registry.register(adapter, f"import of {path}"), was_present=False)


@contextmanager
def _copied(
    path: Path, registry: Registry, read: Callable[[Path], T], progress: Progress
) -> Iterator[tuple[Partial, T, str]]:
    """Copy a file that `read` accepts; yield the copy, what `read` says of it, and its hash."""
    read(path)  # before the long copy
    blobs = registry.blobs
    blobs.remove_stale_partials()
    with blobs.unnamed_partial() as copy:
        with storage_errors(path):
            size = path.stat().st_size
        blobs.require_space(size, f"import {path.name}")
        local.copy(path, copy, size, progress=progress)
        header = read(copy.path)
        with storage_errors(copy.path):
            sha256 = sha256_of(copy.file, progress)
        yield copy, header, sha256


def _adapter(
    base: RegisteredModel, header: AdapterHeader, file: ModelFile, *, name: str, licence: str, created: int
) -> RegisteredModel:
    return replace(
        base,
        kind="lora",
        licence=licence,
        created=created,
        files=(file,),
        quantisation=header.quantisation,
        minimum_memory=file.size,
        adapter=name,
        rank=header.rank,
    )


def _now(clock: Clock | None) -> int:
    return int((clock or SystemClock()).unix())


def _model_file(path: Path) -> Path:
    with storage_errors(path):
        found = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf") if path.is_dir() else None
    if found is not None:
        if len(found) != 1:
            names = ", ".join(each.name for each in found) or "none"
            raise InvalidRequestError(
                f"The folder {path} holds {len(found)} GGUF files ({names:.300}); it must be one.",
                advice="Name the file itself.",
            )
        path = found[0]
    if _SPLIT_NAME.search(path.name):
        raise ModelFileError(
            f"{path.name} is a part of a split model.",
            advice="Join the parts first: llama-gguf-split --merge FIRST-PART JOINED-FILE.",
        )
    return path


def _task_of(header: GGUFHeader) -> str:
    if header.embeds:
        return "embedding"
    return "chat" if header.chat_template else "completion"


def _minimum_memory(header: GGUFHeader, size: int) -> int:
    return size + header.kv_bytes_per_token * min(header.context_length, KV_CELLS) + PROGRAM_BYTES
