"""JSON Schemas before they become grammars: bounded, and put in terms that the grammar engine knows (pure).

What it does not know it refuses by name. What is rewritten here describes the same values, or fewer:

- `dependencies`, `dependentRequired` and `dependentSchemas` become alternatives: without the property, or with what it
  asks for;
- a `format` that JSON Schema does not define asserts nothing, as the specification says, and is left out;
- `oneOf` becomes `anyOf` where its alternatives exclude each other, or do so once each leaves out a property that the
  other one requires.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import msgspec

from appliance.core.errors import InvalidRequestError

MOST_SCHEMA_BYTES = 128 * 1024
MOST_DEPTH = 100
"""Objects and lists inside each other; each takes room on the native stack."""
MOST_LEVELS = 1_500
"""The depth, times the places that references lead to: so deep it may be once they are followed. The native stack ends
at about twice as many levels, and the process with it."""
MOST_PROPERTY_PAIRS = 5_000
"""Patterns of property names are held against each other and against every name, which takes time for each pair."""
MOST_ALTERNATIVES = 32
"""Alternatives of a `oneOf` that are held against each other here."""

_KNOWN_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_OTHER_FORMATS = frozenset(
    (
        *("idn-email", "idn-hostname", "iri", "iri-reference", "uri-reference", "uri-template"),
        *("json-pointer", "relative-json-pointer", "regex"),
    )
)
_TYPES = frozenset(("null", "boolean", "object", "array", "number", "string"))
_OF_ONE = ("items", "additionalItems", "additionalProperties")
_OF_MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_DEPENDENCIES = ("dependencies", "dependentRequired", "dependentSchemas")


def prepared_schema(text: str, param: str) -> str:
    """Return a schema, as JSON, in the terms that the grammar engine knows.

    Args:
        text: The schema as JSON.
        param: The request's field that it came in, for errors.

    Raises:
        InvalidRequestError: It is no JSON Schema, too large, too deep, or has a feature that is not supported.
    """
    size = len(text.encode())
    if size > MOST_SCHEMA_BYTES:
        raise _refused(f"has {size} bytes; {MOST_SCHEMA_BYTES} are allowed", param)
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _refused(f"is no JSON: {error}", param) from error
    if not isinstance(schema, dict):
        raise _refused("must be a JSON object", param)
    depth, places = _depth(schema), len(_references(schema))
    if depth > MOST_DEPTH:
        raise _refused(f"is {depth} levels deep; {MOST_DEPTH} are allowed", param)
    if depth * places > MOST_LEVELS:
        raise _refused(
            f"is {depth} levels deep and its $refs lead to {places} places, which may come to {depth * places} levels; "
            f"{MOST_LEVELS} are allowed",
            param,
        )
    return msgspec.json.encode(_Rewriting(schema, param).rewrite(schema, _TYPES)).decode()


def check_strict(text: str, param: str) -> None:
    """Check a schema against OpenAI's rules for `strict`.

    Raises:
        InvalidRequestError: The root is no object, or an object allows additional properties or has optional ones.
    """
    schema = msgspec.json.decode(text)
    if not isinstance(schema, dict) or schema.get("type") != "object" or "anyOf" in schema:
        raise _refused('must have "type": "object" at its root, and no anyOf there, where `strict` is true', param)
    for place, each in _subschemas(schema, "#"):
        if "object" not in _listed(each.get("type")) and "properties" not in each:
            continue
        if each.get("additionalProperties") is not False:
            raise _refused(f'must say "additionalProperties": false at {place}, since `strict` is true', param)
        optional = sorted(set(_mapping(each.get("properties"))) - set(_names(each.get("required"))))
        if optional:
            names = ", ".join(map(repr, optional[:5]))
            raise _refused(f"must require every property, since `strict` is true; at {place} not {names}", param)


def patterns_of(text: str) -> list[str]:
    """Return the regular expressions in a prepared schema."""
    found = []
    for _, each in _subschemas(msgspec.json.decode(text), "#"):
        found += [*_mapping(each.get("patternProperties"))]
        if isinstance(each.get("pattern"), str):
            found.append(each["pattern"])
    return found


class _Rewriting:
    """The rewriting of one schema; `root` is what its references lead into."""

    def __init__(self, root: Any, param: str) -> None:
        self._root = root
        self._param = param
        self._one_base = all(place == "#" or not each.keys() & {"$id", "id"} for place, each in _subschemas(root, "#"))

    def rewrite(self, schema: Any, types: frozenset[str]) -> Any:
        """Return the schema rewritten; `types` are those that a value can have by what is around it."""
        if not isinstance(schema, dict):
            return schema
        types &= self._types(schema)
        changed = dict(schema)
        for name, value in schema.items():
            if name in _OF_NAMES and isinstance(value, dict):
                changed[name] = {each: self.rewrite(inner, _TYPES) for each, inner in value.items()}
            elif name in _OF_MANY and isinstance(value, list):
                inside = _TYPES if name in ("prefixItems", "items") else types
                changed[name] = [self.rewrite(inner, inside) for inner in value]
            elif name in _OF_ONE:
                changed[name] = self.rewrite(value, _TYPES)
        self._drop_format(changed)
        self._check_patterns(changed)
        self._tell_alternatives_apart(changed, types)
        return _without_dependencies(changed)

    def _drop_format(self, schema: dict[str, Any]) -> None:
        name = schema.get("format")
        if not isinstance(name, str) or name in _KNOWN_FORMATS:
            return
        if name in _OTHER_FORMATS:
            raise _refused(f"has the format {name!r}, which is not supported", self._param)
        del schema["format"]

    def _check_patterns(self, schema: Mapping[str, Any]) -> None:
        patterns = len(_mapping(schema.get("patternProperties")))
        pairs = patterns * (patterns + len(_mapping(schema.get("properties"))))
        if pairs > MOST_PROPERTY_PAIRS:
            raise _refused(
                f"has an object of {patterns} patternProperties; names and patterns make {pairs} pairs to compare, "
                f"and {MOST_PROPERTY_PAIRS} are allowed",
                self._param,
            )

    def _tell_alternatives_apart(self, schema: dict[str, Any], types: frozenset[str]) -> None:
        """Replace `oneOf` by `anyOf` where it can be made sure that no value satisfies two alternatives."""
        given = schema.get("oneOf")
        if not isinstance(given, list) or not 0 < len(given) <= MOST_ALTERNATIVES:
            return
        if "anyOf" in schema or not self._one_base:  # references may then lead elsewhere than they seem to
            return
        seen = [self._resolved(each) for each in given]
        if not all(isinstance(each, dict) for each in seen):
            return
        additions: list[dict[str, Any]] = [{} for _ in given]
        named = self._told_by_a_property(seen, types)
        for one, other in permutations(range(len(given)), 2):
            if self._excluded(seen[one], seen[other], types) or named:
                continue
            if not self._objects_only(seen[one], types):
                return
            missing = [
                each for each in _names(seen[other].get("required")) if each not in _names(seen[one].get("required"))
            ]
            if not missing:
                return
            additions[one][missing[0]] = False
        del schema["oneOf"]
        schema["anyOf"] = [_also(each, added, named) for each, added in zip(given, additions, strict=True)]

    def _told_by_a_property(self, seen: Sequence[Mapping[str, Any]], types: frozenset[str]) -> str | None:
        """Return a property that has other values in each alternative, if there is one and all are of objects."""
        if not all(self._objects_only(each, types) for each in seen):
            return None
        for name in _mapping(seen[0].get("properties")):
            values = [_values(self._resolved(_mapping(each.get("properties")).get(name))) for each in seen]
            found = [each for each in values if each is not None]
            if len(found) == len(seen) and sum(map(len, found)) == len(frozenset().union(*found)):
                return name
        return None

    def _excluded(self, one: Mapping[str, Any], other: Mapping[str, Any], types: frozenset[str]) -> bool:
        """Return whether no value satisfies both."""
        if not types & self._types(one) & self._types(other):
            return True
        values, others = _values(one), _values(other)
        return values is not None and others is not None and not values & others

    def _objects_only(self, schema: Mapping[str, Any], types: frozenset[str]) -> bool:
        return types & self._types(schema) == {"object"}

    def _types(self, schema: Mapping[str, Any]) -> frozenset[str]:
        """Return the types that a schema allows, as far as it says at once; integers are numbers."""
        listed = _listed(_mapping(self._resolved(schema)).get("type"))
        return frozenset("number" if each == "integer" else each for each in listed) & _TYPES if listed else _TYPES

    def _resolved(self, schema: Any) -> Any:
        """Return what a schema that is nothing but a reference within the document leads to; {} where that fails."""
        for _ in range(8):
            if not isinstance(schema, dict) or "$ref" not in schema:
                return schema
            schema = _at(self._root, schema["$ref"])
        return {}


def _at(root: Any, reference: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return {}
    found = root
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        found = found.get(name, {}) if isinstance(found, dict) else {}
    return found


def _also(schema: Any, left_out: dict[str, Any], named: str | None) -> Any:
    """Return an alternative that leaves properties out, and has the one that names it."""
    if named is None and not left_out:
        return schema
    more: dict[str, Any] = {"type": "object"}
    if left_out:
        more["properties"] = left_out
    if named is not None:
        more["required"] = [named]
    return {"allOf": [schema, more]}


def _without_dependencies(schema: dict[str, Any]) -> dict[str, Any]:
    given = schema.get("allOf", [])
    if not isinstance(given, list):
        return schema  # the engine says what is wrong with it
    alternatives = []
    for keyword in _DEPENDENCIES:
        for name, asked in _mapping(schema.pop(keyword, None)).items():
            with_it = (
                {"required": [name, *asked]} if isinstance(asked, list) else {"allOf": [asked, {"required": [name]}]}
            )
            alternatives.append({"anyOf": [{"properties": {name: False}}, with_it]})
    if alternatives:
        schema["allOf"] = [*given, *alternatives]
    return schema


def _values(schema: Any) -> frozenset[bytes] | None:
    """Return the values of an `enum` or `const`, as JSON in which equal ones look equal, or None if any will do."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return frozenset((_canonical(schema["const"]),))
    given = schema.get("enum")
    return frozenset(map(_canonical, given)) if isinstance(given, list) else None


def _canonical(value: Any) -> bytes:
    whole = isinstance(value, float) and value.is_integer()
    return msgspec.json.encode(int(value) if whole else value, order="sorted")


def _subschemas(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(schema, dict):
        return
    yield place, schema
    for name, value in schema.items():
        if name in _OF_NAMES and isinstance(value, dict):
            for each, inner in value.items():
                yield from _subschemas(inner, f"{place}/{name}/{each}")
        elif name in _OF_MANY and isinstance(value, list):
            for index, inner in enumerate(value):
                yield from _subschemas(inner, f"{place}/{name}/{index}")
        elif name in _OF_ONE:
            yield from _subschemas(value, f"{place}/{name}")


def _layers(value: Any) -> Iterator[list[Any]]:
    """Yield the objects and lists of each level, from the outermost on, without recursion."""
    layer = [value]
    while layer := [each for each in layer if isinstance(each, dict | list)]:
        yield layer
        layer = [inner for each in layer for inner in (each.values() if isinstance(each, dict) else each)]


def _depth(value: Any) -> int:
    return sum(1 for _ in _layers(value))


def _references(value: Any) -> set[str]:
    found = (each.get("$ref") for layer in _layers(value) for each in layer if isinstance(each, dict))
    return {each for each in found if isinstance(each, str)}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _names(value: Any) -> Sequence[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _listed(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else _names(value)


def _refused(problem: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(f"The schema {problem}.", param=param, code="invalid_grammar")
