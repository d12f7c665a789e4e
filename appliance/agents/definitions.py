"""What a request says of a built-in tool, checked. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from appliance.core.errors import InvalidRequestError

T = TypeVar("T", bound=msgspec.Struct)


def read_definition(definition: Mapping[str, Any], kind: type[T]) -> T:
    """Return a tool's definition as its type.

    Raises:
        InvalidRequestError: A field is missing, unknown or of another type.
    """
    try:
        return msgspec.convert(dict(definition), kind)
    except msgspec.ValidationError as error:
        raise bad_definition(str(definition.get("type")), str(error)) from error


def bad_definition(kind: str, problem: str) -> InvalidRequestError:
    """Return the error for a definition that will not do."""
    return InvalidRequestError(f"The tool {kind!r} will not do: {problem}", param="tools", code="invalid_value")
