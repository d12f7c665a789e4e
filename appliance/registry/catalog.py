"""The catalog: every model that can be had, from the built-in manifests and from the site's own folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.core.errors import ModelFileError, NotFoundError, SettingsError
from appliance.core.settings import Settings
from appliance.registry.manifest import Manifest, read_manifest

BUILT_IN_FOLDER = Path(__file__).parent / "manifests"
"""In the repository a link to the folder `models` at its top; in an installed package the manifests themselves."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A manifest and the folder it stands in, where its relative paths start."""

    manifest: Manifest
    folder: Path


class Catalog:
    """The manifests by name and version."""

    def __init__(self, entries: Sequence[CatalogEntry]) -> None:
        self.entries = sorted(
            entries,
            key=lambda each: (
                each.manifest.name,
                version_order(each.manifest.version),
                each.manifest.adapter or "",
            ),
        )

    def find(self, name: str) -> CatalogEntry:
        """Return the entry of this full name, or the one of the highest version that has this short name.

        Raises:
            NotFoundError: There is none; the message names those that exist.
        """
        matching = [each for each in self.entries if name in each.manifest.names]
        if not matching:
            known = ", ".join(each.manifest.full_name for each in self.entries) or "none"
            raise NotFoundError(
                f"The catalog has no model {name!r:.100}; it has: {known}.",
                advice="A model file of your own comes in with `appliance models import PATH`.",
                code="model_not_found",
                param="model",
            )
        return matching[-1]


def open_catalog(settings: Settings) -> Catalog:
    """Read the built-in manifests and those of `catalog_dir`; of two with one name and version the site's counts.

    Raises:
        ModelFileError: A manifest is wrong, or one folder has two of the same name and version.
        SettingsError: `catalog_dir` is no folder.
    """
    found = {entry.manifest.full_name: entry for entry in _read_folder(BUILT_IN_FOLDER)}
    if settings.catalog_dir is not None:
        if not settings.catalog_dir.is_dir():
            raise SettingsError(f"catalog_dir is {settings.catalog_dir}, which is no folder.", param="catalog_dir")
        found |= {entry.manifest.full_name: entry for entry in _read_folder(settings.catalog_dir)}
    return Catalog(list(found.values()))


def version_order(version: str) -> list[tuple[int, int, str]]:
    """Return a sort key by which 10 comes after 9, and 1.0 before 1.0.1."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.findall(r"[0-9]+|[^0-9]+", version)]


def _read_folder(folder: Path) -> list[CatalogEntry]:
    paths: dict[str, Path] = {}
    entries = []
    for path in sorted(folder.glob("*.toml")):
        manifest = read_manifest(path)
        if other := paths.get(manifest.full_name):
            raise ModelFileError(
                f"{path} and {other} both describe {manifest.full_name}.", advice="Give one another version."
            )
        paths[manifest.full_name] = path
        entries.append(CatalogEntry(manifest, folder))
    return entries
