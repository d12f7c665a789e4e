"""The OpenAPI document of the box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from appliance.api.openai.items import MessageItem
from appliance.core.settings import Settings
from appliance.web.exposure import MAKE_KEY
from appliance.web.openapi import About
from appliance.web.openapi import openapi_document as document_of
from appliance.web.routes import Operation

_ABOUT = About(
    title="appliance",
    description="Models on this box behind the OpenAI API, and under /v2 behind the Open Inference "
    "Protocol. Fields that they define are acted on, "
    "ignored where they change nothing, or refused where ignoring them would change the answer.",
    make_key=MAKE_KEY,
)


def openapi_document(operations: Sequence[Operation], settings: Settings, *, keys_required: bool) -> dict[str, Any]:
    """Return the document of this server as it is set up.

    Args:
        operations: The table of routes.
        settings: For limits that appear in schemas.
        keys_required: Whether requests need an API key.
    """
    document = document_of(operations, _ABOUT, keys_required=keys_required, limits=settings)
    schemas = document["components"]["schemas"]
    schemas[MessageItem.__name__]["required"].remove("type")  # it is one where the type is left out
    return document
