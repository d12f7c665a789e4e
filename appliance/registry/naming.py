"""What an imported model is called, which version it is, and under which licence it comes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from appliance.core.errors import InvalidRequestError
from appliance.registry.files import storage_errors
from appliance.registry.manifest import NAME_PATTERN, check_licence
from appliance.registry.versions import Registry

_ANY_FOLDER, _ANY_FILE = "onnx", "model.onnx"
"""What ONNX models of all kinds are called; the folder above tells which one it is."""


def name_from(path: Path) -> str:
    """Return a name made from that of a file or folder.

    Raises:
        InvalidRequestError: Nothing of it can stand in a name.
    """
    with storage_errors(path):
        place = path.absolute().parent if path.name == _ANY_FILE else path
        stem = place.resolve().name if place.is_dir() else place.stem
    if place.is_dir() and stem == _ANY_FOLDER:
        stem = place.resolve().parent.name
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64]
    if not name:
        raise InvalidRequestError(
            f"No model name can be made from the file name {path.name!r}.", advice="Give one with --name.", param="name"
        )
    return name


def checked_name(param: str, text: str) -> str:
    """Return a name or version if it can be one.

    Raises:
        InvalidRequestError: It cannot.
    """
    if not re.match(NAME_PATTERN, text):
        raise InvalidRequestError(
            f"The {param} {text!r:.100} cannot be: up to 64 of a-z, 0-9, '.', '_' and '-', beginning with a-z or 0-9.",
            param=param,
        )
    return text


def version_of(registry: Registry, name: str, digests: Mapping[str, str]) -> str:
    """Return the version these bytes have under the name already, or else the next number."""
    versions = [each for each in registry.list() if each.name == name and not each.adapter]
    for model in reversed(versions):
        if model.digests == digests:
            return model.version
    return str(max((int(each.version) for each in versions if each.version.isdecimal()), default=0) + 1)


def licence_of(text: str) -> str:
    """Return what a file says of its licence, as an SPDX expression."""
    with suppress(InvalidRequestError):
        return check_licence(text)
    return "LicenseRef-" + (re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-")[:60] or "unknown")
