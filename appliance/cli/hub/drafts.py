"""What is to be released: a manifest of the registry, the files it speaks of, and what they must meet on a box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from appliance.core.errors import InvalidRequestError, NotFoundError
from appliance.core.releases import Criteria, GoldenInput
from appliance.core.settings import Settings
from appliance.hub.releases import Draft, DraftFile
from appliance.registry.catalog import open_catalog
from appliance.registry.manifest import Manifest, read_manifest
from appliance.store.files import open_regular, storage_errors

if TYPE_CHECKING:
    from appliance.registry.manifest import ManifestFile

_LARGEST_CRITERIA_BYTES = 1024 * 1024


def draft_of(
    manifest: str,
    path: Path,
    *,
    version: str | None,
    criteria: Path | None,
    hardware: Sequence[str],
    least_agent: str,
    least_counter: int = 0,
) -> Draft:
    """Return what is to be released.

    Args:
        manifest: A TOML file, or a model's name in the catalog.
        path: The model's file, or a folder with its files by name, by role or as `sha256-<hex>`.
        version: Replaces the manifest's.
        criteria: TOML file, or None.
        hardware: Classes it is for; empty is all.
        least_agent: Oldest program version that can run it, or "".
        least_counter: The release counter is no less than this.

    Raises:
        NotFoundError: There is no such model or file.
        InvalidRequestError: It is an adapter, or the criteria have a field that there is not.
        ModelFileError: The manifest is wrong.
    """
    found = _manifest(manifest)
    if found.kind == "lora":
        raise InvalidRequestError("Adapters cannot be released to a fleet yet, only models.")
    return Draft(
        model=found.name,
        version=version or found.version,
        kind=found.kind,
        task=found.task,
        licence=found.licence,
        files=[
            DraftFile(each.role, _find(each, path, alone=len(found.files) == 1), (each.sha256, each.size))
            for each in sorted(found.files, key=lambda file: file.role != "model")
        ],
        minimum_memory=found.minimum_memory,
        hardware=tuple(hardware),
        least_agent=least_agent,
        default_context=found.defaults.context,
        chat_template=found.defaults.template,
        stop=found.defaults.stop,
        criteria=Criteria() if criteria is None else read_criteria(criteria),
        least_counter=least_counter,
    )


def read_criteria(path: Path) -> Criteria:
    """Read what a release must meet.

    Raises:
        NotFoundError: There is no such file.
        InvalidRequestError: It is not TOML, or a field is unknown or of the wrong type; the message says which.
    """
    with storage_errors(path), open_regular(path) as file:
        text = file.read(_LARGEST_CRITERIA_BYTES)
    try:
        document: dict[str, Any] = msgspec.toml.decode(text, type=dict[str, Any])
        criteria = msgspec.convert(document, type=Criteria)
        _refuse_unknown(document, Criteria)
        for each in document.get("golden", ()):
            _refuse_unknown(each, GoldenInput)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRequestError(f"The criteria {path} are wrong: {error}.", param="criteria") from error
    return criteria


def _manifest(name: str) -> Manifest:
    if name.endswith(".toml"):
        return read_manifest(Path(name))
    return open_catalog(Settings()).find(name).manifest


def _find(file: ManifestFile, path: Path, *, alone: bool) -> Path:
    if alone and path.is_file():
        return path
    candidates = [path / file.name, path / file.role, path / f"sha256-{file.sha256}"]
    for each in candidates:
        if each.is_file():
            return each
    raise NotFoundError(
        f"There is no {file.name} in {path}.",
        advice=f"The model's files are looked for by name, by role ({file.role}) and as sha256-{file.sha256}.",
    )


def _refuse_unknown(document: dict[str, Any], kind: type[Any]) -> None:
    known = set(kind.__struct_fields__)
    unknown = sorted(document.keys() - known)
    if unknown:
        raise ValueError(f"there is no {unknown[0]!r}; there are {', '.join(sorted(known))}")
