"""Whether the files on the disk are still what they were when their models were registered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from appliance.core.errors import ApplianceError
from appliance.registry.files import Progress, no_progress, open_regular, sha256_of, storage_errors
from appliance.registry.known import ModelFile, RegisteredModel


@dataclass(frozen=True, slots=True)
class Finding:
    """One file of one model; `problem` is empty where it is sound."""

    model: RegisteredModel
    file: ModelFile
    problem: str


def verify(models: Sequence[RegisteredModel], progress: Progress = no_progress) -> list[Finding]:
    """Read every file of the models from the disk and compare its hash."""
    return [Finding(model, file, _problem(file, progress)) for model in models for file in model.files]


def _problem(file: ModelFile, progress: Progress) -> str:
    try:
        with storage_errors(file.path), open_regular(file.path) as content:
            size = os.fstat(content.fileno()).st_size
            if size != file.size:
                return f"It has {size:,} bytes instead of {file.size:,}."
            # What memory remembers of the file would hide a disk that has gone bad.
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = sha256_of(content, progress)
    except ApplianceError as error:
        return error.message
    return "" if found == file.sha256 else f"Its SHA-256 is {found}, not the one it is named after."
