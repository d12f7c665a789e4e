"""Schemas are bounded, refused by name, or put in terms that describe the same values or fewer."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import InvalidRequestError
from appliance.serving.schemas import MOST_SCHEMA_BYTES, check_strict, patterns_of, prepared_schema

A, B = {"required": ["a"]}, {"required": ["b"]}


def prepared(schema: Any) -> Any:
    return json.loads(prepared_schema(json.dumps(schema), "f"))


def refusal(schema: Any) -> str:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(InvalidRequestError) as refused:
        prepared_schema(text, "f")
    assert (refused.value.param, refused.value.code) == ("f", "invalid_grammar")
    return refused.value.message


def valid(schema: Any, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "is no JSON"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, "is no JSON"),
        ([], "must be a JSON object"),
        (True, "must be a JSON object"),
        ({"description": "x" * MOST_SCHEMA_BYTES}, "131072 are allowed"),
        (json.loads('{"items":' * 101 + "{}" + "}" * 101), "102 levels deep; 100 are allowed"),
        ({"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(500)}}, "500 places"),
        ({"type": "string", "format": "iri"}, "format 'iri'"),
        ({"properties": {"p": {"items": {"format": "regex"}}}}, "format 'regex'"),
        ({"patternProperties": {f"^{i}": {} for i in range(100)}}, "10000 pairs"),
    ],
)
def test_what_is_too_much_or_not_supported_is_refused_with_the_figures(schema: Any, words: str) -> None:
    assert words in refusal(schema)


def test_a_format_that_the_standard_does_not_define_says_nothing() -> None:
    assert prepared({"type": "string", "format": "topic"}) == {"type": "string"}
    assert prepared({"format": "date"}) == {"format": "date"}
    assert prepared({"properties": {"format": {"type": "string"}}}) == {"properties": {"format": {"type": "string"}}}
    assert prepared({"format": ["iri"]}) == {"format": ["iri"]}


def test_what_is_no_schema_is_left_to_the_engine_to_refuse() -> None:
    broken = {"allOf": 7, "dependentRequired": {"a": ["b"]}}
    assert prepared(broken) == broken


@pytest.mark.parametrize(
    "schema",
    [
        {"dependentRequired": {"a": ["b"]}},
        {"dependencies": {"a": ["b"], "b": {"required": ["c"]}}},
        {"allOf": [{"type": "object"}], "dependentSchemas": {"a": {"properties": {"b": {"type": "integer"}}}}},
    ],
)
def test_dependencies_become_alternatives_that_say_the_same(schema: dict[str, Any]) -> None:
    new = prepared(schema)
    assert not new.keys() & {"dependencies", "dependentRequired", "dependentSchemas"}
    validator = jsonschema.Draft7Validator if "dependencies" in schema else jsonschema.Draft202012Validator
    value: Any
    for value in ({}, {"a": 1}, {"a": 1, "b": 2}, {"b": "x"}, {"a": 1, "b": "x", "c": 3}, 7, []):
        assert valid(new, value) == validator(schema).is_valid(value), value


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "oneOf": [A, B]},
        {"type": "object", "oneOf": [{"required": ["a", "b"]}, {"required": ["c"]}, {"required": ["b", "d"]}]},
        {"oneOf": [{"type": "null"}, {"type": ["integer", "array"]}, {"type": "object"}]},
        {"oneOf": [{"const": 1}, {"enum": [2.0, "x"]}]},
        {
            "type": "object",
            "oneOf": [
                {"properties": {"x": {}, "kind": {"const": "square"}}},
                {"properties": {"kind": {"enum": ["circle"]}}},
            ],
        },
        {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"type": "object"}}},
        {"type": "object", "oneOf": [A]},
        {"type": "object", "oneOf": [{"$ref": "#/$defs/a~1b"}, B], "$defs": {"a/b": A}},
    ],
)
def test_alternatives_that_can_be_told_apart_become_any_of_and_never_allow_more(schema: dict[str, Any]) -> None:
    new = prepared(schema)
    assert "oneOf" not in new
    values: list[Any] = [None, 1, 2, "x", [], {}, {"kind": "square"}, {"kind": "circle"}, {"kind": "square", "x": 1}]
    names = "abcd"
    values += [{each: 1 for each in names if bits >> names.index(each) & 1} for bits in range(16)]
    for value in values:
        assert valid(schema, value) or not valid(new, value), value
    assert any(valid(new, value) for value in values)


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [A, B]},
        {"type": "object", "oneOf": [A, {"required": ["a", "b"]}]},
        {"type": "object", "oneOf": [True, A]},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"oneOf": [{"enum": [1, 2]}, {"const": 2.0}]},
        {"type": "object", "oneOf": [A, B], "anyOf": [A]},
        {"type": "object", "oneOf": [A, B], "items": {"$id": "x"}},
        {"type": "object", "oneOf": [{"properties": {"k": {"const": 1}}}, {"properties": {"k": {"enum": [1, 2]}}}]},
        {"oneOf": [{"$ref": "#/oneOf/0"}, {"$ref": "other.json"}]},
        {"oneOf": [{"$ref": 7}, {"$ref": "#/x/y"}]},
        {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"type": "object", "oneOf": [{"required": [f"p{i}"]} for i in range(33)]},
        {"type": "object", "oneOf": []},
        {"oneOf": 7},
    ],
)
def test_alternatives_that_may_overlap_are_left_to_be_refused(schema: dict[str, Any]) -> None:
    assert prepared(schema)["oneOf"] == schema["oneOf"]


NAMES = st.sampled_from("abc")
BRANCH = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "string", "null", ["object", "null"]]),
        "required": st.lists(NAMES, unique=True),
        "properties": st.dictionaries(NAMES, st.sampled_from([{"const": 1}, {"enum": [2, 3]}, {"const": 3.0}, {}])),
        "const": st.sampled_from([1, "x", None]),
    },
)
VALUES = [
    None,
    "x",
    1,
    *(
        {name: value for name, value in zip("abc", each, strict=True) if value}
        for each in (
            (0, 0, 0),
            (1, 0, 0),
            (0, 1, 0),
            (0, 0, 1),
            (1, 1, 0),
            (2, 0, 1),
            (3, 3, 0),
            (1, 2, 3),
            (3, 3, 3),
            (2, 1, 2),
        )
    ),
]


@given(st.lists(BRANCH, min_size=1, max_size=4), st.booleans())
def test_rewritten_alternatives_never_allow_what_the_schema_does_not(branches: list[Any], objects: bool) -> None:
    schema = {"oneOf": branches, **({"type": "object"} if objects else {})}
    new = prepared(schema)
    for value in VALUES:
        assert valid(schema, value) or not valid(new, value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "oneOf",
                        "anyOf",
                        "properties",
                        "items",
                        "$ref",
                        "required",
                        "enum",
                        "format",
                        "dependencies",
                        "dependentRequired",
                        "patternProperties",
                        "allOf",
                        "x",
                    ]
                ),
                inner,
            )
        ),
    )
)
def test_anything_is_prepared_or_refused(schema: Any) -> None:
    try:
        text = prepared_schema(json.dumps(schema), "f")
    except InvalidRequestError:
        return
    patterns_of(text)


STRICT = {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}


def test_strict_schemas_pass() -> None:
    check_strict(json.dumps(STRICT), "f")
    nested = {**STRICT, "properties": {"a": {"anyOf": [{"type": "null"}, STRICT, {"items": STRICT}, True]}}}
    check_strict(json.dumps(nested), "f")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], "at its root"),
        ({"type": "array"}, "at its root"),
        ({**STRICT, "anyOf": [{}]}, "at its root"),
        ({**STRICT, "additionalProperties": True}, 'additionalProperties": false at #,'),
        ({**STRICT, "required": []}, "at # not 'a'"),
        ({**STRICT, "properties": {"a": {"properties": {}}}}, "at #/properties/a"),
        ({**STRICT, "$defs": {"b": {"items": {"type": ["object"]}}}}, "at #/$defs/b/items"),
        ({**STRICT, "$defs": {"b": {"anyOf": [{"type": "object"}]}}}, "at #/$defs/b/anyOf/0"),
    ],
)
def test_what_breaks_the_rules_of_strict_is_refused_with_the_place(schema: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_strict(json.dumps(schema), "f")
    assert words in refused.value.message


def test_every_pattern_is_found() -> None:
    schema = {"pattern": "a", "patternProperties": {"b": {"pattern": "c"}}, "items": {"pattern": 7}}
    assert patterns_of(json.dumps(schema)) == ["b", "a", "c"]
