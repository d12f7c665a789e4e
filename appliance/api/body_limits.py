"""How large the body of each request to the box may be."""

from __future__ import annotations

from appliance.core.settings import Settings
from appliance.web.limits import BodyLimit

UPLOAD_PATH = "/v1/files"

FORM_BYTES = 64 * 1024
"""What a form may have around the file that it brings."""


def limit_of(path: str, settings: Settings) -> BodyLimit:
    """Return the limit for a path: of tensors, of an upload with the form around it, or of anything else."""
    if path.startswith("/v2/models/") and path.endswith("/infer"):
        return BodyLimit("max_tensor_body_bytes", settings.max_tensor_body_bytes)
    if path == UPLOAD_PATH:
        return BodyLimit("max_file_bytes", settings.max_file_bytes + FORM_BYTES, each_mebibyte=True)
    return BodyLimit("max_body_bytes", settings.max_body_bytes)
