"""A tool's JSON Schema as a grammar wants it: an object, closed where it is plain, and written in one way. Pure.

What a grammar allows then satisfies the schema that was given, which may allow more: properties that it does not name,
for instance, which no tool waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.serving.structured import prepared

MAX_DEPTH = 64
"""Of objects and lists in a schema."""

ONE_WAY = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Exactly as chat templates write JSON: the model need not choose, and cannot fill its answer with blanks."""
_OPENING = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref", "if"}
)
"""With one of these a schema says elsewhere what properties there are."""


def argument_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool's arguments as llguidance reads it.

    Raises:
        InvalidRequestError: The parameters are no object, too large, too deep, or have a feature that is not supported.
    """
    check_depth(parameters, MAX_DEPTH)
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequestError(
            f"A tool's parameters have the type {kind!r}.",
            advice='Arguments are an object: give the schema `"type": "object"`.',
            param="tools",
            code="invalid_grammar",
        )
    whole = parameters or {"properties": {}}
    text = msgspec.json.encode(_closed({**whole, "type": "object"})).decode()
    ready = prepared(Grammar("json_schema", text, param="tools"))
    return {**msgspec.json.decode(ready.text), "x-guidance": ONE_WAY}


def check_depth(value: Any, most: int) -> None:
    """Refuse plain data with more than `most` objects and lists within each other.

    Raises:
        InvalidRequestError: It is nested more deeply.
    """
    waiting = [(value, 1)]
    while waiting:
        each, depth = waiting.pop()
        if isinstance(each, Mapping):
            below = list(each.values())
        elif isinstance(each, list):
            below = each
        else:
            continue
        if depth > most:
            raise InvalidRequestError(
                f"A tool's schema has more than {most} objects and lists within each other.",
                advice="Flatten it, or name its parts under `$defs`.",
                param="tools",
                code="invalid_grammar",
            )
        waiting += [(one, depth + 1) for one in below]


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that allows no properties but those that it names, so far as it names them plainly."""
    if not _OPENING.isdisjoint(schema):
        return dict(schema)
    closed = dict(schema)
    if isinstance(properties := schema.get("properties"), dict):
        closed["properties"] = {name: _closed_if_schema(each) for name, each in properties.items()}
        closed["additionalProperties"] = False
    if isinstance(items := schema.get("items"), dict):
        closed["items"] = _closed(items)
    return closed


def _closed_if_schema(value: Any) -> Any:
    return _closed(value) if isinstance(value, dict) else value
