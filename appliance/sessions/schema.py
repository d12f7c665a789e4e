"""The schema of `sessions.db`: conversations as a ledger that is written at its end and shared by its forks.

    line A   1 ── 2 ── 3 ── 4 ── 5           conversation A: 1 … 5
                       │
    line B             └── 4 ── 5            forked at 3: A's 1 … 3, then its own
                                │
    line C                      └── 6        forked from B at 5: A's 1 … 3, B's 4 and 5, then its own

Each conversation has a line of its own; where the line leaves its parent is all that a fork costs. A message's position
counts from the conversation's start, through all lines of the path to it, so that one index finds any page of it.

    lines.start         the last position on the parent that is part of the path; the line's own begin behind it
    lines.waste         to be looked through: its conversation is gone, and what no fork holds is to go as well
    messages.hash       of the hash of the message before it and of its own content: a changed past is seen
    messages.item       NULL once erased; position and hash stay
    removals            messages that a conversation has removed and a fork still holds, by the conversation's line
    responses.waste     the response counts as deleted, and its rows are to go
    responses.before    the response whose items come before this one's, 0 if none; goes on over what was deleted
    erasures            deletions whose words may still be in a file, and the session that the models are to forget
    search              words as `core.words` makes them, by the key of the message; `scope` has tenant and line
"""

from __future__ import annotations

from pathlib import Path

from appliance.store.database import Database
from appliance.store.migrations import Migration

MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        "ledger",
        (
            """
            CREATE TABLE lines (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                tenant TEXT NOT NULL,
                parent INTEGER REFERENCES lines (key),
                start INTEGER NOT NULL,
                waste INTEGER NOT NULL DEFAULT 0
            ) STRICT
            """,
            "CREATE INDEX lines_parent ON lines (parent, start)",
            "CREATE INDEX lines_waste ON lines (key) WHERE waste",
            """
            CREATE TABLE conversations (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                id TEXT NOT NULL UNIQUE,
                tenant TEXT NOT NULL,
                line INTEGER NOT NULL UNIQUE REFERENCES lines (key),
                head INTEGER NOT NULL,
                last TEXT NOT NULL,
                forked_from TEXT NOT NULL,
                title TEXT NOT NULL,
                metadata TEXT NOT NULL,
                created INTEGER NOT NULL,
                updated INTEGER NOT NULL
            ) STRICT
            """,
            "CREATE INDEX conversations_tenant ON conversations (tenant, updated, key)",
            "CREATE INDEX conversations_updated ON conversations (updated)",
            """
            CREATE TABLE messages (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                line INTEGER NOT NULL REFERENCES lines (key),
                position INTEGER NOT NULL,
                id TEXT,
                item TEXT,
                hash BLOB NOT NULL CHECK (length(hash) = 32),
                response TEXT NOT NULL DEFAULT '',
                UNIQUE (line, position)
            ) STRICT
            """,
            "CREATE UNIQUE INDEX messages_id ON messages (line, id) WHERE id IS NOT NULL",
            """
            CREATE TABLE removals (
                line INTEGER NOT NULL REFERENCES lines (key),
                message INTEGER NOT NULL REFERENCES messages (key),
                PRIMARY KEY (line, message)
            ) STRICT, WITHOUT ROWID
            """,
            "CREATE INDEX removals_message ON removals (message)",
            """
            CREATE TABLE summaries (
                line INTEGER NOT NULL REFERENCES lines (key),
                position INTEGER NOT NULL,
                until TEXT NOT NULL,
                text TEXT NOT NULL,
                model TEXT NOT NULL,
                PRIMARY KEY (line, position)
            ) STRICT
            """,
            """
            CREATE TABLE responses (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                id TEXT NOT NULL UNIQUE,
                tenant TEXT NOT NULL,
                created INTEGER NOT NULL,
                status TEXT NOT NULL,
                request TEXT NOT NULL,
                body TEXT NOT NULL,
                input TEXT NOT NULL,
                previous TEXT NOT NULL,
                before INTEGER NOT NULL,
                conversation TEXT NOT NULL,
                background INTEGER NOT NULL,
                waste INTEGER NOT NULL DEFAULT 0
            ) STRICT
            """,
            "CREATE INDEX responses_before ON responses (before)",
            "CREATE INDEX responses_conversation ON responses (conversation) WHERE conversation <> ''",
            "CREATE INDEX responses_created ON responses (created)",
            "CREATE INDEX responses_waste ON responses (key) WHERE waste",
            "CREATE INDEX responses_unfinished ON responses (key) WHERE status IN ('queued', 'in_progress')",
            """
            CREATE TABLE steps (
                response INTEGER NOT NULL REFERENCES responses (key) ON DELETE CASCADE,
                number INTEGER NOT NULL,
                kind TEXT NOT NULL CHECK (kind IN ('model', 'call', 'result')),
                data TEXT NOT NULL,
                PRIMARY KEY (response, number)
            ) STRICT
            """,
            """
            CREATE TABLE events (
                response INTEGER NOT NULL REFERENCES responses (key) ON DELETE CASCADE,
                number INTEGER NOT NULL,
                event TEXT NOT NULL,
                PRIMARY KEY (response, number)
            ) STRICT
            """,
            "CREATE TABLE erasures (key INTEGER PRIMARY KEY AUTOINCREMENT, session TEXT NOT NULL) STRICT",
            "CREATE VIRTUAL TABLE search USING fts5 (scope, terms, tokenize = 'ascii', detail = column)",
            "CREATE VIRTUAL TABLE search_terms USING fts5vocab (search, row)",
            "CREATE TABLE search_made_with (version INTEGER NOT NULL) STRICT",
        ),
    ),
)
"""The history of the schema, oldest first."""


def open_ledger(path: Path) -> Database:
    """Open or create `sessions.db`; what is deleted from it is overwritten.

    Raises:
        UnreadableDatabaseError: The file is damaged, or was written by a newer version.
        StorageError: It cannot be opened.
    """
    return Database(path, migrations=MIGRATIONS, overwrite_deleted=True)
