"""Files as the registry handles them, which is how every room does: see `store/files.py`."""

from __future__ import annotations

from appliance.store.files import (
    CHUNK_BYTES,
    Progress,
    free_bytes,
    no_progress,
    open_regular,
    sha256_of,
    storage_errors,
    sync_folder,
)

__all__ = [
    "CHUNK_BYTES",
    "Progress",
    "free_bytes",
    "no_progress",
    "open_regular",
    "sha256_of",
    "storage_errors",
    "sync_folder",
]
