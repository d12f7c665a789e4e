"""A tool's schema as a grammar wants it."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.serving.tools.schemas import MAX_DEPTH, ONE_WAY, argument_schema, check_depth

CLOSED = {"additionalProperties": False, "type": "object", "x-guidance": ONE_WAY}
PLAIN = {"properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({}, {"properties": {}, **CLOSED}),
        (PLAIN, {**PLAIN, **CLOSED}),
        ({"type": "object", **PLAIN}, {**PLAIN, **CLOSED}),
        ({"type": ["object", "null"], **PLAIN}, {**PLAIN, **CLOSED}),
        (
            {"properties": {"inner": PLAIN, "any": True}},
            {"properties": {"inner": {**PLAIN, "additionalProperties": False}, "any": True}, **CLOSED},
        ),
        (
            {"properties": {"list": {"items": PLAIN}, "pair": {"items": False}}},
            {
                "properties": {
                    "list": {"items": {**PLAIN, "additionalProperties": False}},
                    "pair": {"items": False},
                },
                **CLOSED,
            },
        ),
        ({"x-guidance": {"lenient": True}, **PLAIN}, {**PLAIN, **CLOSED}),
    ],
)
def test_plain_objects_are_closed_and_written_in_one_way(parameters: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert argument_schema(parameters) == wanted


@pytest.mark.parametrize(
    "says_elsewhere",
    [
        {"additionalProperties": {"type": "string"}},
        {"additionalProperties": True},
        {"patternProperties": {"^x": {}}},
        {"allOf": [{"properties": {"b": {}}}]},
        {"anyOf": [{"required": ["a"]}]},
        {"$ref": "#/$defs/thing"},
    ],
)
def test_an_object_that_says_elsewhere_what_it_has_stays_open(says_elsewhere: dict[str, Any]) -> None:
    schema = {**PLAIN, **says_elsewhere}
    assert argument_schema(schema) == {**schema, "type": "object", "x-guidance": ONE_WAY}


@pytest.mark.parametrize("kind", ["string", ["string", "null"], None, 7])
def test_arguments_are_an_object(kind: object) -> None:
    with pytest.raises(InvalidRequestError, match="object") as refusal:
        argument_schema({"type": kind})
    assert refusal.value.param == "tools"


def test_depth_is_bounded() -> None:
    deep: Any = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    check_depth(deep, MAX_DEPTH)
    with pytest.raises(InvalidRequestError, match=str(MAX_DEPTH)):
        check_depth({"a": deep, "b": 1}, MAX_DEPTH)
    endless: Any = {}
    for _ in range(100_000):
        endless = {"a": endless}
    with pytest.raises(InvalidRequestError):
        argument_schema(endless)
