"""Filters on a file's attributes as SQL (pure).

Types are exact: a number never equals a text, and a truth value is neither. A file that has not the attribute, or has
one of another type, matches `ne` and `nin` only. Texts are in the order of their code points, so dates in ISO 8601
compare as dates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from appliance.core.errors import InvalidRequestError
from appliance.core.retrieval import AttributeValue, Comparison, Filter

MOST_DEPTH = 8
"""Compounds inside each other; the outermost is the first."""

MOST_COMPARISONS = 64
MOST_VALUES = 2000
"""Of all comparisons together; SQLite takes 32,766 parameters of a statement."""

MOST_TEXT = 4096
"""Characters of one value."""

MOST_KEY = 64
"""Characters of an attribute's name, as in OpenAI's API."""

SqlValue = str | int | float

_ORDER = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_LARGEST_INTEGER = 2**63 - 1


_OF_ONE = "EXISTS (SELECT 1 FROM json_each(store_files.attributes) AS attribute WHERE attribute.key = ? AND ({test}))"
_OF_ALL = (
    "store_files.key IN (SELECT attribute.store_file FROM attributes AS attribute"
    " WHERE attribute.store = ?1 AND attribute.name = ? AND ({test}))"
)


@dataclass(frozen=True, slots=True)
class Condition:
    """What stands behind WHERE, for rows of `store_files`.

    Attributes:
        sql: Quick to ask of a few files.
        indexed: The same and that they are of a store, whose key is the statement's first parameter; quick to ask of
            all files.
        parameters: The values of its question marks in order.
    """

    sql: str
    indexed: str
    parameters: tuple[SqlValue, ...]


def condition(wanted: Filter) -> Condition:
    """Return the condition for files whose attributes pass the filter.

    Raises:
        InvalidRequestError: The filter is too large, or compares what has no order.
    """
    _check_size(wanted)
    sql, parameters = _translated(wanted, _OF_ONE)
    indexed, _ = _translated(wanted, _OF_ALL)
    if not _begins_with_attributes(wanted):
        indexed = f"store_files.store = ?1 AND ({indexed})"
    return Condition(sql, indexed, tuple(parameters))


def _begins_with_attributes(wanted: Filter) -> bool:
    """Tell whether files that pass have an attribute that says so: then SQLite begins with these, and not with all."""
    if isinstance(wanted, Comparison):
        return wanted.type not in ("ne", "nin")
    return (any if wanted.type == "and" else all)(map(_begins_with_attributes, wanted.filters))


def is_key(name: str) -> bool:
    """Return True if a name has nothing in it that would make another of it in a path of JSON."""
    return not any(each in '"\\\x7f' or each < " " for each in name)


def _check_size(wanted: Filter) -> None:
    comparisons = values = depth = 0
    level: list[Filter] = [wanted]
    while level:
        below: list[Filter] = []
        for each in level:
            if isinstance(each, Comparison):
                comparisons += 1
                values += len(each.value) if isinstance(each.value, tuple) else 1
            else:
                below += each.filters
        depth += bool(below)
        # checked at every level, so that a hostile filter is not walked to its end
        _check_most(depth, MOST_DEPTH, "compounds inside each other")
        _check_most(comparisons, MOST_COMPARISONS, "comparisons")
        _check_most(values, MOST_VALUES, "values")
        level = below


def _check_most(count: int, most: int, what: str) -> None:
    if count > most:
        raise _bad(f"The filter has more than {most} {what}.", "Search with a simpler filter.")


def _translated(wanted: Filter, form: str) -> tuple[str, list[SqlValue]]:
    if isinstance(wanted, Comparison):
        return _comparison(wanted, form)
    if not wanted.filters:
        raise _bad(f"A filter of the type {wanted.type!r} has no filters.", "Give one or more, or leave it out.")
    parts = [_translated(each, form) for each in wanted.filters]
    sql = f" {wanted.type.upper()} ".join(f"({each})" for each, _ in parts)
    return sql, [value for _, values in parts for value in values]


def _comparison(wanted: Comparison, form: str) -> tuple[str, list[SqlValue]]:
    _check_text(wanted.key, MOST_KEY, "key")
    if not is_key(wanted.key):
        raise _bad(f"The key {wanted.key!r} has a quotation mark, a backslash or a control character.", "")
    test, parameters = _test(wanted)
    negation = "NOT " if wanted.type in ("ne", "nin") else ""
    return negation + form.format(test=test), [wanted.key, *parameters]


def _test(wanted: Comparison) -> tuple[str, list[SqlValue]]:
    """Return the test of one attribute's type and value; that of `ne` and `nin` is still to be turned round."""
    value = wanted.value
    if wanted.type in ("in", "nin"):
        if not isinstance(value, tuple):
            raise _bad(f"A filter of the type {wanted.type!r} compares {wanted.key!r} with one value.", "Give a list.")
        return _any_of(value)
    if isinstance(value, tuple):
        raise _bad(f"A filter of the type {wanted.type!r} compares {wanted.key!r} with a list.", "Give one value.")
    if wanted.type in ("eq", "ne"):
        return _any_of([value])
    if isinstance(value, bool):
        raise _bad(f"{wanted.key!r} is compared with a truth value, which has no order.", "Use `eq` or `ne`.")
    types = "= 'text'" if isinstance(value, str) else "IN ('integer', 'real')"
    return f"attribute.type {types} AND attribute.value {_ORDER[wanted.type]} ?", [_checked(value)]


def _any_of(values: Sequence[AttributeValue]) -> tuple[str, list[SqlValue]]:
    truths = sorted({str(each).lower() for each in values if isinstance(each, bool)})
    texts = [_checked(each) for each in values if isinstance(each, str)]
    numbers = [_checked(each) for each in values if not isinstance(each, str | bool)]
    tests = [f"attribute.type = '{each}'" for each in truths]
    if texts:
        tests.append(f"attribute.type = 'text' AND attribute.value IN ({_marks(texts)})")
    if numbers:
        tests.append(f"attribute.type IN ('integer', 'real') AND attribute.value IN ({_marks(numbers)})")
    return " OR ".join(tests) or "FALSE", texts + numbers


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _checked(value: str | float) -> SqlValue:
    """Return a value as SQLite takes it."""
    if isinstance(value, str):
        _check_text(value, MOST_TEXT, "value")
        return value
    if isinstance(value, int) and abs(value) <= _LARGEST_INTEGER:
        return value
    try:
        number = float(value)  # as JSON of SQLite reads an integer of more than 64 bits
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _bad("A filter compares with a number that is none, or too large.", "Give one below 1.7e308.")
    return number


def _check_text(text: str, most: int, what: str) -> None:
    if len(text) > most:
        raise _bad(f"A {what} of the filter has {len(text):,} characters.", f"Give at most {most}.")
    if "\0" in text or any("\ud800" <= each <= "\udfff" for each in text):
        raise _bad(f"A {what} of the filter has a NUL or half a surrogate pair, which no attribute has.", "")


def _bad(message: str, advice: str) -> InvalidRequestError:
    return InvalidRequestError(message, advice=advice, param="filters")
