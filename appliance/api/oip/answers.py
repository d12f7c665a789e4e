"""Documents as answers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.responses import Response


def json_answer(value: msgspec.Struct | Sequence[msgspec.Struct]) -> Response:
    """Return a success with a JSON document."""
    return Response(msgspec.json.encode(value), headers={"cache-control": "no-store"}, media_type="application/json")
