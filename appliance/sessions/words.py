"""The keyword index over one's own history: FTS5, fed with terms that are made the same way in every language.

SQLite's own tokenizers find nothing in Chinese, so `core.words` makes the terms, and FTS5 cuts at blanks only. Tenant
and line are terms of a column of their own: what others wrote is left out before anything is ranked.
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.core.sessions import Item
from appliance.core.words import VERSION, passage_terms, query_terms
from appliance.sessions.texts import text_of
from appliance.store.database import Connection

POSTING_BUDGET = 20_000
"""A question's rarest words count, until so many occurrences have been looked at: FTS5 ranks all that match."""

MERGE_PAGES = 200
"""Work of one transaction when the index is written anew; other writers take turns with it."""

_SIGNS = {code: 0xE000 + code for code in range(128) if not chr(code).isalnum()}
"""The ASCII tokenizer cuts at every sign but those beyond ASCII."""


def index(connection: Connection, message: int, item: Item, *, tenant: str, line: int) -> None:
    """Make an item findable."""
    terms = " ".join(term.translate(_SIGNS) for term in passage_terms(text_of(item)))
    if terms:
        values = (message, f"{_tenant_term(tenant)} {_line_term(line)}", terms)
        connection.execute("INSERT OR REPLACE INTO search (rowid, scope, terms) VALUES (?, ?, ?)", values)


def forget(connection: Connection, messages: Sequence[int]) -> None:
    """Make messages unfindable; their words are in the file until `merge` has nothing left to do."""
    connection.executemany("DELETE FROM search WHERE rowid = ?", [(each,) for each in messages])


def merge(connection: Connection, *, begin: bool) -> bool:
    """Write a part of the index anew, without what was deleted, and return whether more is to be done."""
    before = connection.total_changes
    pages = -MERGE_PAGES if begin else MERGE_PAGES
    connection.execute("INSERT INTO search (search, rank) VALUES ('merge', ?)", (pages,))
    return connection.total_changes - before >= 2


def find_in_tenant(connection: Connection, query: str, tenant: str) -> Sequence[int]:
    """Return keys of messages that a tenant wrote, best first."""
    return _find(connection, query, _quoted(_tenant_term(tenant)))


def find_in_lines(connection: Connection, query: str, lines: Sequence[int]) -> Sequence[int]:
    """Return keys of messages on some lines, best first."""
    return _find(connection, query, " OR ".join(_quoted(_line_term(each)) for each in lines))


def _find(connection: Connection, query: str, scope: str) -> Sequence[int]:
    terms = _affordable(connection, [term.translate(_SIGNS) for term in query_terms(query)])
    if not terms:
        return ()
    wanted = f"scope : ({scope}) AND terms : ({' OR '.join(_quoted(term) for term in terms)})"
    sql = "SELECT rowid FROM search WHERE search MATCH ? ORDER BY bm25(search, 0, 1), rowid DESC"
    return [int(key) for (key,) in connection.execute(sql, (wanted,))]


def _affordable(connection: Connection, terms: Sequence[str]) -> list[str]:
    """Return the rarest of those terms that occur at all, within the budget; one at least."""
    counted = [(_occurrences(connection, term), term) for term in terms]
    chosen: list[str] = []
    left = POSTING_BUDGET
    for count, term in sorted(each for each in counted if each[0]):
        left -= count
        if left < 0 and chosen:
            break
        chosen.append(term)
    return chosen


def _occurrences(connection: Connection, term: str) -> int:
    row = connection.execute("SELECT doc FROM search_terms WHERE term = ?", (term,)).fetchone()
    return 0 if row is None else int(row[0])


def is_current(connection: Connection) -> bool:
    """Return whether the index was made with the terms of this program."""
    row = connection.execute("SELECT version FROM search_made_with").fetchone()
    return row is not None and int(row[0]) == VERSION


def begin_anew(connection: Connection) -> None:
    """Empty the index."""
    connection.execute("DELETE FROM search")
    connection.execute("DELETE FROM search_made_with")


def end_anew(connection: Connection) -> None:
    """Note with which terms the index was made, now that it is whole."""
    connection.execute("INSERT INTO search_made_with VALUES (?)", (VERSION,))


def _tenant_term(tenant: str) -> str:
    return "t" + tenant.encode().hex()


def _line_term(line: int) -> str:
    return f"l{line}"


def _quoted(term: str) -> str:
    return '"' + term.replace('"', '""') + '"'
