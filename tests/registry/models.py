"""Manifests of tiny models, and what must hold after a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from appliance.registry.catalog import CatalogEntry
from appliance.registry.manifest import Manifest
from appliance.registry.versions import Registry


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A sound GGUF file of about 130 kB."""

    path: Path
    content: bytes
    sha256: str

    @property
    def size(self) -> int:
        return len(self.content)


def document(tiny: TinyModel, *sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a manifest as the TOML would be read."""
    file = {"name": "tiny.gguf", "sha256": tiny.sha256, "size": tiny.size, "sources": list(sources)}
    return {
        "name": "tiny",
        "version": "1",
        "kind": "gguf",
        "task": "chat",
        "licence": "MIT",
        "minimum_memory": 1_000_000,
        "files": [file],
    } | changes


def entry(tiny: TinyModel, *sources: dict[str, Any], folder: Path = Path("/"), **changes: Any) -> CatalogEntry:
    return CatalogEntry(msgspec.convert(document(tiny, *sources, **changes), Manifest), folder)


def write_manifest(folder: Path, content: dict[str, Any]) -> Path:
    """Write a manifest into a catalog folder."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{content['name']}-{content['version']}.toml"
    path.write_bytes(as_toml(content))
    return path


def as_toml(content: dict[str, Any]) -> bytes:
    """Write the few types that a manifest has; JSON's strings, numbers and lists are TOML's too."""
    plain = {key: value for key, value in content.items() if not isinstance(value, list | dict)}
    lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in plain.items()]
    for file in content["files"]:
        lines.append("[[files]]")
        lines += [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in file.items() if key != "sources"]
        for source in file.get("sources", []):
            lines.append("[[files.sources]]")
            lines += [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in source.items()]
    if defaults := content.get("defaults"):
        lines.append("[defaults]")
        lines += [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in defaults.items()]
    return "\n".join(lines).encode()


def assert_nothing_visible(registry: Registry) -> None:
    """No model is registered, and no blob is there."""
    assert registry.list() == []
    assert not registry.blobs.folder.exists() or list(registry.blobs.folder.iterdir()) == []


def partial_names(registry: Registry) -> list[str]:
    folder = registry.blobs.partial_folder
    return sorted(each.name for each in folder.iterdir()) if folder.exists() else []
