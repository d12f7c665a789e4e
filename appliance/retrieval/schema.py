"""The schema of `retrieval.db`: the truth of files, stores, chunks and vectors. Both indexes are derived from it.

A chunk counts only while the row of its `store_files` is there: deleting that row takes all of a file's chunks out of
every search at once, and their own rows are erased behind it. So whatever a search finds is looked up with a join on
`store_files`.

    stages of a store_file     queued → cut (chunks are there) → keywords (keyword index has them) → done (vectors too)
    store_files.first_chunk    NULL until cut; a file's chunks have this id and those that follow, without a gap
    chunks.vector              NULL until embedded; within a store, chunks are embedded in the order of their ids
    stores.next_model          set while a store is embedded with another model: `reembedding`
    vectors                    one for each text and model of a tenant, however many chunks have that text
    attributes                 store_files.attributes, one a row, for filters; triggers keep it so
    erased_chunks              ids whose rows are gone, and that may still be in an index: ranges, both ends included
"""

from __future__ import annotations

from pathlib import Path

from appliance.store.database import Database
from appliance.store.migrations import Migration

_ATTRIBUTES = """
    INSERT INTO attributes (store, name, type, value, store_file)
    SELECT {row}.store, each.key, each.type, each.value, {row}.key FROM {source}json_each({row}.attributes) AS each
    WHERE each.type IN ('text', 'integer', 'real', 'true', 'false')
"""
_ATTRIBUTES_NEW = _ATTRIBUTES.format(row="NEW", source="")
_ATTRIBUTES_OLD = "DELETE FROM attributes WHERE store_file = OLD.key"

MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        "documents",
        (
            """
            CREATE TABLE files (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                id TEXT NOT NULL UNIQUE,
                tenant TEXT NOT NULL,
                filename TEXT NOT NULL,
                purpose TEXT NOT NULL,
                size INTEGER NOT NULL,
                media_type TEXT NOT NULL,
                created INTEGER NOT NULL,
                expires INTEGER
            ) STRICT
            """,
            "CREATE INDEX files_tenant ON files (tenant)",
            "CREATE INDEX files_expires ON files (expires) WHERE expires IS NOT NULL",
            """
            CREATE TABLE stores (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                id TEXT NOT NULL UNIQUE,
                tenant TEXT NOT NULL,
                name TEXT NOT NULL,
                description TEXT NOT NULL,
                metadata TEXT NOT NULL,
                created INTEGER NOT NULL,
                last_active INTEGER NOT NULL,
                expires_after_days INTEGER,
                model TEXT NOT NULL DEFAULT '',
                dimensions INTEGER NOT NULL DEFAULT 0,
                lease_owner TEXT NOT NULL DEFAULT '',
                lease_until REAL NOT NULL DEFAULT 0
            ) STRICT
            """,
            "CREATE INDEX stores_tenant ON stores (tenant)",
            """
            CREATE TABLE batches (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                id TEXT NOT NULL UNIQUE,
                store INTEGER NOT NULL REFERENCES stores (key) ON DELETE CASCADE,
                created INTEGER NOT NULL,
                cancelled INTEGER NOT NULL DEFAULT 0
            ) STRICT
            """,
            "CREATE INDEX batches_store ON batches (store)",
            """
            CREATE TABLE store_files (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                store INTEGER NOT NULL REFERENCES stores (key),
                file INTEGER NOT NULL REFERENCES files (key),
                created INTEGER NOT NULL,
                status TEXT NOT NULL CHECK (status IN ('in_progress', 'completed', 'cancelled', 'failed')),
                stage TEXT NOT NULL CHECK (stage IN ('queued', 'cut', 'keywords', 'done')),
                attributes TEXT NOT NULL,
                most_tokens INTEGER NOT NULL,
                overlap_tokens INTEGER NOT NULL,
                batch TEXT NOT NULL,
                error_code TEXT NOT NULL DEFAULT '',
                error TEXT NOT NULL DEFAULT '',
                chunks INTEGER NOT NULL DEFAULT 0,
                embedded INTEGER NOT NULL DEFAULT 0,
                usage INTEGER NOT NULL DEFAULT 0,
                lease_owner TEXT NOT NULL DEFAULT '',
                lease_until REAL NOT NULL DEFAULT 0,
                attempts INTEGER NOT NULL DEFAULT 0,
                UNIQUE (store, file)
            ) STRICT
            """,
            "CREATE INDEX store_files_file ON store_files (file)",
            "CREATE INDEX store_files_status ON store_files (store, status)",
            "CREATE INDEX store_files_batch ON store_files (batch) WHERE batch <> ''",
            "CREATE INDEX store_files_waiting ON store_files (stage, key) WHERE status = 'in_progress'",
            """
            CREATE TABLE chunks (
                id INTEGER PRIMARY KEY AUTOINCREMENT,
                store INTEGER NOT NULL,
                store_file INTEGER NOT NULL,
                position INTEGER NOT NULL,
                text TEXT NOT NULL,
                start INTEGER NOT NULL,
                "end" INTEGER NOT NULL,
                page INTEGER,
                heading TEXT NOT NULL,
                tokens INTEGER NOT NULL,
                text_hash BLOB NOT NULL CHECK (length(text_hash) = 32),
                vector INTEGER
            ) STRICT
            """,
            "CREATE INDEX chunks_store_file ON chunks (store_file, position)",
            "CREATE INDEX chunks_store ON chunks (store)",
            "CREATE INDEX chunks_embedded ON chunks (store) WHERE vector IS NOT NULL",
            "CREATE INDEX chunks_waiting ON chunks (store) WHERE vector IS NULL",
            "CREATE INDEX chunks_vector ON chunks (vector) WHERE vector IS NOT NULL",
            """
            CREATE TABLE vectors (
                id INTEGER PRIMARY KEY AUTOINCREMENT,
                text_hash BLOB NOT NULL CHECK (length(text_hash) = 32),
                model TEXT NOT NULL,
                vector BLOB NOT NULL,
                UNIQUE (text_hash, model)
            ) STRICT
            """,
            """
            CREATE TABLE erasures (
                key INTEGER PRIMARY KEY AUTOINCREMENT,
                store INTEGER,
                store_file INTEGER,
                file TEXT
            ) STRICT
            """,
            """
            CREATE TABLE erased_chunks (
                erasure INTEGER NOT NULL REFERENCES erasures (key) ON DELETE CASCADE,
                store INTEGER NOT NULL,
                first INTEGER NOT NULL,
                last INTEGER NOT NULL,
                PRIMARY KEY (erasure, first)
            ) STRICT
            """,
            """
            CREATE TABLE generations (
                store INTEGER PRIMARY KEY,
                generation INTEGER NOT NULL,
                last_chunk INTEGER NOT NULL,
                count INTEGER NOT NULL
            ) STRICT
            """,
        ),
    ),
    Migration(
        2,
        "embedding with another model",
        (
            "ALTER TABLE stores ADD COLUMN next_model TEXT",
            "ALTER TABLE stores ADD COLUMN next_dimensions INTEGER NOT NULL DEFAULT 0",
            "ALTER TABLE stores ADD COLUMN next_chunk INTEGER NOT NULL DEFAULT 0",
            "ALTER TABLE chunks ADD COLUMN next_vector INTEGER",
            "CREATE INDEX chunks_next_vector ON chunks (next_vector) WHERE next_vector IS NOT NULL",
        ),
    ),
    Migration(
        3,
        "attributes by value, chunks by range",
        (
            """
            CREATE TABLE attributes (
                store INTEGER NOT NULL,
                name TEXT NOT NULL,
                type TEXT NOT NULL,
                value ANY NOT NULL,
                store_file INTEGER NOT NULL,
                PRIMARY KEY (store, name, type, value, store_file)
            ) STRICT, WITHOUT ROWID
            """,
            "CREATE INDEX attributes_store_file ON attributes (store_file)",
            "ALTER TABLE store_files ADD COLUMN first_chunk INTEGER",
            "UPDATE store_files SET first_chunk = (SELECT min(id) FROM chunks WHERE store_file = store_files.key)",
            _ATTRIBUTES.format(row="store_files", source="store_files CROSS JOIN "),
            f"CREATE TRIGGER attributes_new AFTER INSERT ON store_files BEGIN {_ATTRIBUTES_NEW}; END",
            f"CREATE TRIGGER attributes_gone AFTER DELETE ON store_files BEGIN {_ATTRIBUTES_OLD}; END",
            "CREATE TRIGGER attributes_changed AFTER UPDATE OF attributes ON store_files BEGIN "
            f"{_ATTRIBUTES_OLD}; {_ATTRIBUTES_NEW}; END",
        ),
    ),
)
"""The history of the schema, oldest first."""


def open_retrieval(path: Path) -> Database:
    """Open or create `retrieval.db`; what is deleted from it is overwritten.

    Raises:
        UnreadableDatabaseError: The file is damaged, or was written by a newer version.
        StorageError: It cannot be opened.
    """
    return Database(path, migrations=MIGRATIONS, overwrite_deleted=True)
