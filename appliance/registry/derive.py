"""How an ONNX model that was made of another one comes in: its own graph, and the other one's remaining files.

files → copies → checked with the original's files → blobs → register, while the original is held
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from appliance.core.clock import Clock, SystemClock
from appliance.registry.blobs import Partial
from appliance.registry.files import Progress, no_progress, sha256_of, storage_errors
from appliance.registry.install import Installed
from appliance.registry.install_onnx import Identity, registered_as
from appliance.registry.known import ModelFile, RegisteredModel
from appliance.registry.naming import checked_name, version_of
from appliance.registry.onnx_folder import read_model
from appliance.registry.roles import MODEL
from appliance.registry.sources import local
from appliance.registry.versions import Registry


def register_derived(
    original: RegisteredModel,
    files: Mapping[str, Path],
    registry: Registry,
    *,
    replaced: frozenset[str],
    name: str,
    version: str | None,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> Installed:
    """Copy files in and register them, with the original's other files, as a model of their own.

    Args:
        original: What they were made of; the caller holds it.
        files: The new graph, with the role `model`, and files of other roles.
        registry: Where to.
        replaced: Roles of the original that the new model does not have, beside its graph.
        name: Of the new model.
        version: None is 1, or one more than the highest number there is.
        progress: Told of every long step.
        clock: For the time of registration.

    Raises:
        InvalidRequestError: A name or version that cannot be.
        ModelFileError: The new model is not sound; nothing is kept.
        StorageError: The disk is too full.
        ConflictError: Other files have that name and version.
    """
    name = checked_name("name", name)
    version = checked_name("version", version) if version else None
    kept = [each for each in original.files if each.role not in files and each.role not in replaced]
    with ExitStack() as held:
        copies = {role: _copied(path, registry, held, progress) for role, path in files.items()}
        made = [
            ModelFile(role, registry.blobs.path(sha256), sha256, copy.size) for role, (copy, sha256) in copies.items()
        ]
        others = {role: copy.path for role, (copy, _) in copies.items() if role != MODEL}
        model = read_model(copies[MODEL][0].path, others | {each.role: each.path for each in kept}, original.task)
        all_files = (*made, *kept)
        digests = {each.role: each.sha256 for each in all_files}
        version = version or version_of(registry, name, digests)
        known = registry.registered(name, version, digests)
        if known and all(registry.blobs.has(each.sha256, each.size) for each in known.files):
            return Installed(known, was_present=True)
        for copy, sha256 in copies.values():
            copy.publish(sha256)
        identity = Identity(name, version, original.licence, int((clock or SystemClock()).unix()))
        saved = original.size - sum(each.size for each in all_files)
        registered = registered_as(identity, model, all_files, original.minimum_memory - saved)
        return Installed(registry.register(registered, f"made of {original.full_name}"), was_present=False)


def _copied(path: Path, registry: Registry, held: ExitStack, progress: Progress) -> tuple[Partial, str]:
    """Copy one file to where it can become a blob, and return it with its hash; `held` closes it."""
    copy = held.enter_context(registry.blobs.unnamed_partial())
    with storage_errors(path):
        size = path.stat().st_size
    registry.blobs.require_space(size, f"register {path.name}")
    local.copy(path, copy, size, progress=progress)
    with storage_errors(copy.path):
        return copy, sha256_of(copy.file, progress)
