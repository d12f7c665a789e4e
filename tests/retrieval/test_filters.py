"""Filters against a plain reading of what they mean, on real SQLite."""

from __future__ import annotations

import json
import operator
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import InvalidRequestError
from appliance.core.retrieval import AttributeValue, Comparison, Compound, Filter
from appliance.retrieval.filters import MOST_COMPARISONS, MOST_DEPTH, MOST_KEY, MOST_TEXT, MOST_VALUES, condition
from appliance.retrieval.passages import Passages
from appliance.retrieval.schema import MIGRATIONS, open_retrieval
from appliance.store.database import Connection, Database

STORE = 7
FILES: list[dict[str, AttributeValue]] = [
    {},
    {"year": 2020},
    {"year": 2021.0},
    {"year": "2020"},
    {"year": True},
    {"year": False},
    {"date": "2024-02-29", "language": "中文"},
    {"date": "2023-12-31", "language": "de"},
    {"huge": 10**30},
]


@pytest.fixture(scope="module")
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.execute(
        "CREATE TABLE store_files (key INTEGER PRIMARY KEY, store INTEGER NOT NULL, attributes TEXT NOT NULL)"
    )
    connection.execute("CREATE TABLE chunks (id INTEGER PRIMARY KEY, store_file INTEGER)")
    for statement in MIGRATIONS[2].statements:
        connection.execute(statement)
    yield connection
    connection.close()


def matching(database: sqlite3.Connection, wanted: Filter, files: list[dict[str, AttributeValue]]) -> list[int]:
    database.execute("DELETE FROM store_files")
    rows = [(number, STORE, json.dumps(each, ensure_ascii=False)) for number, each in enumerate(files)]
    of_others = [(len(rows) + number, STORE + 1, attributes) for number, _, attributes in rows]
    database.executemany("INSERT INTO store_files (key, store, attributes) VALUES (?, ?, ?)", rows + of_others)
    where = condition(wanted)
    query = f"SELECT key FROM store_files WHERE store = ? AND ({where.sql}) ORDER BY key"
    found = [each for (each,) in database.execute(query, (STORE, *where.parameters))]
    query = f"SELECT key FROM store_files WHERE {where.indexed} ORDER BY key"
    assert [each for (each,) in database.execute(query, (STORE, *where.parameters))] == found
    return found


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Comparison("eq", "year", 2020), [1]),
        (Comparison("eq", "year", 2021), [2]),
        (Comparison("eq", "year", "2020"), [3]),
        (Comparison("eq", "year", True), [4]),
        (Comparison("eq", "year", 1), []),
        (Comparison("ne", "year", 2020), [0, 2, 3, 4, 5, 6, 7, 8]),
        (Comparison("ne", "year", False), [0, 1, 2, 3, 4, 6, 7, 8]),
        (Comparison("gt", "year", 2020), [2]),
        (Comparison("gte", "year", 2020), [1, 2]),
        (Comparison("lt", "year", 2021), [1]),
        (Comparison("lte", "year", 2021), [1, 2]),
        (Comparison("lt", "year", "3"), [3]),
        (Comparison("gte", "date", "2024-01-01"), [6]),
        (Comparison("in", "year", (2020, "2020", True)), [1, 3, 4]),
        (Comparison("nin", "year", (2020, "2020", True)), [0, 2, 5, 6, 7, 8]),
        (Comparison("in", "year", ()), []),
        (Comparison("nin", "year", ()), list(range(9))),
        (Comparison("in", "language", ("中文", "fr")), [6]),
        (Comparison("eq", "huge", 10**30), [8]),
        (Comparison("gt", "huge", 2**63), [8]),
        (Compound("and", (Comparison("gte", "year", 2020), Comparison("lt", "year", 2021))), [1]),
        (Compound("or", (Comparison("eq", "year", 2020), Comparison("eq", "language", "de"))), [1, 7]),
        (Compound("or", (Compound("and", (Comparison("eq", "date", "2024-02-29"),)),)), [6]),
    ],
)
def test_types_are_exact_and_what_is_missing_differs(
    database: sqlite3.Connection, wanted: Filter, found: list[int]
) -> None:
    assert matching(database, wanted, FILES) == found


@pytest.mark.parametrize(
    "key", ["a b", "a.b", "a'b", "$", "[0]", "中文", "x); DROP TABLE store_files; --", "%", "key", "attribute.key", ""]
)
def test_a_key_is_a_name_and_never_sql_or_a_path(database: sqlite3.Connection, key: str) -> None:
    files: list[dict[str, AttributeValue]] = [{key: "x' OR 1=1 --"}, {"other": 1}]
    assert matching(database, Comparison("eq", key, "x' OR 1=1 --"), files) == [0]
    assert matching(database, Comparison("ne", key, "x"), files) == [0, 1]


def nested(depth: int) -> Filter:
    wanted: Filter = Comparison("eq", "a", 1)
    for _ in range(depth):
        wanted = Compound("and", (wanted,))
    return wanted


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (nested(MOST_DEPTH + 1), "inside each other"),
        (nested(100_000), "inside each other"),
        (Compound("or", (Comparison("eq", "a", 1),) * (MOST_COMPARISONS + 1)), "comparisons"),
        (Comparison("in", "a", (1,) * (MOST_VALUES + 1)), "values"),
        (Compound("and", ()), "has no filters"),
        (Comparison("gt", "a", True), "no order"),
        (Comparison("gt", "a", (1, 2)), "with a list"),
        (Comparison("eq", "a", (1,)), "with a list"),
        (Comparison("in", "a", 1), "with one value"),
        (Comparison("eq", "a", float("nan")), "a number that is none"),
        (Comparison("in", "a", (float("inf"),)), "a number that is none"),
        (Comparison("eq", "a", 10**400), "too large"),
        (Comparison("eq", "k" * (MOST_KEY + 1), 1), "characters"),
        (Comparison("eq", "a", "v" * (MOST_TEXT + 1)), "characters"),
        (Comparison("eq", "a\0", 1), "NUL"),
        (Comparison("eq", "a", "\ud800"), "surrogate"),
        (Comparison("eq", 'a"b', 1), "quotation mark"),
        (Comparison("eq", "a\\b", 1), "quotation mark"),
        (Comparison("eq", "a\n", 1), "control character"),
    ],
)
def test_a_filter_that_will_not_do_is_refused(wanted: Filter, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        condition(wanted)
    assert caught.value.param == "filters"


def test_the_largest_filter_that_is_taken_runs(database: sqlite3.Connection) -> None:
    assert matching(database, nested(MOST_DEPTH), [{"a": 1}]) == [0]
    assert matching(database, Comparison("in", "a", tuple(range(MOST_VALUES))), [{"a": 1999}]) == [0]
    wide = Compound("or", tuple(Comparison("eq", "a", each) for each in range(MOST_COMPARISONS)))
    assert matching(database, wide, [{"a": MOST_COMPARISONS - 1}]) == [0]


KEYS = st.sampled_from(["a", "b", "ключ"])
TEXTS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=4)
VALUES: st.SearchStrategy[AttributeValue] = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
    st.integers(0, 2),
)
COMPARISONS = st.one_of(
    st.builds(Comparison, st.sampled_from(["eq", "ne"]), KEYS, VALUES),
    st.builds(
        Comparison,
        st.sampled_from(["gt", "gte", "lt", "lte"]),
        KEYS,
        VALUES.filter(lambda each: not isinstance(each, bool)),
    ),
    st.builds(Comparison, st.sampled_from(["in", "nin"]), KEYS, st.lists(VALUES, max_size=3).map(tuple)),
)
FILTERS = st.recursive(
    COMPARISONS,
    lambda inner: st.builds(
        Compound, st.sampled_from(["and", "or"]), st.lists(inner, min_size=1, max_size=3).map(tuple)
    ),
    max_leaves=6,
)


def kind(value: AttributeValue) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def comparable(value: AttributeValue | None) -> Any:
    """Return the value as SQLite keeps it: integers of more than 64 bits are floating-point numbers there."""
    big = isinstance(value, int) and abs(value) > 2**63 - 1
    return float(value or 0) if big else value


def passes(wanted: Filter, attributes: Mapping[str, AttributeValue]) -> bool:
    if isinstance(wanted, Compound):
        return (all if wanted.type == "and" else any)(passes(each, attributes) for each in wanted.filters)
    values = wanted.value if isinstance(wanted.value, tuple) else (wanted.value,)
    has = attributes.get(wanted.key)
    same = [each for each in values if has is not None and kind(each) is kind(has)]
    equal = any(comparable(each) == comparable(has) for each in same)
    if wanted.type in ("eq", "ne", "in", "nin"):
        return equal == (wanted.type in ("eq", "in"))
    holds = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}[wanted.type]
    return any(holds(comparable(has), comparable(each)) for each in same)


@given(wanted=FILTERS, attributes=st.dictionaries(KEYS, VALUES, max_size=3))
def test_sql_finds_what_the_filter_means(
    database: sqlite3.Connection, wanted: Filter, attributes: dict[str, AttributeValue]
) -> None:
    assert bool(matching(database, wanted, [attributes])) == passes(wanted, attributes)


def test_a_filter_sees_attributes_that_are_changed_and_none_of_what_is_gone(database: sqlite3.Connection) -> None:
    wanted = condition(Comparison("in", "year", (1, 2)))
    matching(database, Comparison("eq", "year", 1), [{"year": 1, "other": "x"}, {"year": 1}])
    database.execute("UPDATE store_files SET attributes = '{\"year\": 2}' WHERE key = 0")
    database.execute("DELETE FROM store_files WHERE key <> 0")
    assert database.execute("SELECT * FROM attributes").fetchall() == [(STORE, "year", "integer", 2, 0)]
    query = f"SELECT key FROM store_files WHERE {wanted.indexed}"
    assert database.execute(query, (STORE, *wanted.parameters)).fetchall() == [(0,)]


@pytest.mark.parametrize(
    ("wanted", "begins"),
    [
        (Comparison("eq", "a", 1), True),
        (Comparison("ne", "a", 1), False),
        (Compound("and", (Comparison("ne", "a", 1), Comparison("gt", "b", 1))), True),
        (Compound("or", (Comparison("ne", "a", 1), Comparison("gt", "b", 1))), False),
    ],
)
def test_only_files_that_have_an_attribute_are_looked_at_where_that_will_do(
    database: sqlite3.Connection, wanted: Filter, begins: bool
) -> None:
    found = condition(wanted)
    query = f"EXPLAIN QUERY PLAN SELECT key FROM store_files WHERE {found.indexed}"
    plan = [row[3] for row in database.execute(query, (STORE, *found.parameters))]
    assert ("SEARCH store_files USING INTEGER PRIMARY KEY (rowid=?)" in plan) is begins


def test_attributes_of_files_that_were_there_before_are_filtered_by(tmp_path: Path) -> None:
    old = Database(tmp_path / "retrieval.db", migrations=MIGRATIONS[:2])
    old.write_blocking(
        lambda each: each.execute(
            "INSERT INTO stores (key, id, tenant, name, description, metadata, created, last_active)"
            " VALUES (7, 'vs_1', '', '', '', '{}', 0, 0)"
        ).fetchall()
    )
    for key, attributes in ((1, '{"year": 2020, "month": "May"}'), (2, "{}"), (3, '{"year": 2021}')):
        file = "INSERT INTO files VALUES (?, ?, '', 'a', 'assistants', 1, 'text/plain', 0, NULL)"
        store_file = (
            "INSERT INTO store_files (key, store, file, created, status, stage, attributes, most_tokens,"
            " overlap_tokens, batch, chunks) VALUES (?1, 7, ?1, 0, 'completed', 'done', ?2, 1, 0, '', 2)"
        )
        chunk = (
            'INSERT INTO chunks (id, store, store_file, position, text, start, "end", heading, tokens, text_hash)'
            " VALUES (?1 * 10 + ?2, 7, ?1, ?2, '', 0, 0, '[]', 0, zeroblob(32))"
        )

        def write(connection: Connection) -> None:
            connection.execute(file, (key, str(key)))  # noqa: B023  (it is done)
            connection.execute(store_file, (key, attributes))  # noqa: B023
            connection.executemany(chunk, [(key, 0), (key, 1)])  # noqa: B023

        old.write_blocking(write)
    old.close()
    database = open_retrieval(tmp_path / "retrieval.db")
    passages = Passages(database)
    assert passages.allowed(7, condition(Comparison("gt", "year", 2020))).tolist() == [30, 31]
    assert passages.allowed(7, condition(Comparison("ne", "year", 2020))).tolist() == [20, 21, 30, 31]
    assert passages.allowed(7, condition(Comparison("eq", "month", "June"))).tolist() == []
    database.close()
