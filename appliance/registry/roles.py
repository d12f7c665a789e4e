"""What the files of a model are for, and where each lies in the model's folder.

A role comes from a manifest or a folder that somebody made, and becomes a path of ours: so it is checked first.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePosixPath

from appliance.core.errors import ModelFileError

MODEL = "model"
ADAPTER = "adapter"

GRAPH_NAME = "model.onnx"
"""What the file of the role `model` is called in the folder of a model that has several files."""

MAX_FILES = 64
MAX_DEPTH = 4
MAX_ROLE_CHARACTERS = 255

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")


def check_path_role(role: str) -> str:
    """Return a role that is the file's relative path in the model's folder.

    Raises:
        ModelFileError: It is empty, absolute, too long or too deep, leads out of the folder, is written in another
            way than the shortest, has a backslash or a control character, or is the graph's own name.
    """
    parts = role.split("/")
    if (
        not 0 < len(role.encode(errors="replace")) <= MAX_ROLE_CHARACTERS
        or len(parts) > MAX_DEPTH
        or any(part in ("", ".", "..") for part in parts)
        or _UNSAFE.search(role)
        or not role.isprintable()
    ):
        raise ModelFileError(
            f"{role!r:.100} is no path of a file inside a model's folder.",
            advice=f"It must be relative, without `..`, `.` and backslashes, with at most {MAX_DEPTH} parts and "
            f"{MAX_ROLE_CHARACTERS} bytes.",
        )
    if parts[0] == GRAPH_NAME:
        raise ModelFileError(
            f"{role!r:.100} is the name of the model's graph, and cannot be another file's.",
            advice="Give the other file another name.",
        )
    return role


def check_path_roles(roles: Collection[str]) -> None:
    """Check that files can lie side by side in one folder.

    Raises:
        ModelFileError: There are too many, one is no good, two are the same, or one is a file and a folder at once.
    """
    if len(roles) >= MAX_FILES:
        raise ModelFileError(f"A model of {len(roles) + 1:,} files is refused; at most {MAX_FILES} are taken.")
    seen: set[str] = set()
    for role in roles:
        if check_path_role(role) in seen:
            raise ModelFileError(f"The file {role!r:.100} is there twice.")
        seen.add(role)
    for role in roles:
        for folder in PurePosixPath(role).parents:
            if str(folder) in seen:
                raise ModelFileError(f"{str(folder)!r:.100} is a file, and the folder of {role!r:.100} too.")
