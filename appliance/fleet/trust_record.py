"""The device's own record of what it has verified: in `fleet.db`, each change in one durable transaction."""

from __future__ import annotations

from collections.abc import Mapping

from appliance.core.errors import NotFoundError, UntrustedError
from appliance.security.metadata import Kept
from appliance.security.trust_rules import Mark, merged
from appliance.store.database import Connection, Database

FILES_KEPT = 64


class TrustRecord:
    """What `security.metadata.Client` keeps, and the verified files beside it."""

    def __init__(self, database: Database) -> None:
        """Keep it in `fleet.db`."""
        self._database = database

    @property
    def is_anchored(self) -> bool:
        """Return True if there is a root to begin with."""
        return self._database.read(lambda each: each.execute("SELECT 1 FROM trust_anchor").fetchone() is not None)

    async def anchor(self, root: bytes) -> None:
        """Begin with the root metadata that came with the enrolment; another one than before begins all anew."""

        def write(connection: Connection) -> None:
            row = connection.execute("SELECT document FROM trust_anchor").fetchone()
            if row is not None and bytes(row["document"]) == root:
                return
            for table in ("trust_anchor", "trust_documents", "trust_marks", "trust_files", "trust_seen"):
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 (the names are in the line above)
            connection.execute("INSERT INTO trust_anchor (one, document) VALUES (1, ?)", (root,))

        await self._database.write(write)

    def kept(self) -> Kept:
        """Return the metadata and the marks.

        Raises:
            NotFoundError: The device was never enrolled.
        """

        def look(connection: Connection) -> Kept:
            row = connection.execute("SELECT document FROM trust_anchor").fetchone()
            if row is None:
                raise NotFoundError(
                    "This box has no root of trust.", advice="It comes with the enrolment.", code="not_enrolled"
                )
            documents = connection.execute("SELECT role, document FROM trust_documents")
            return Kept(
                bytes(row["document"]),
                {each["role"]: bytes(each["document"]) for each in documents},
                _marks(connection),
            )

        return self._database.read(look)

    async def keep(self, role: str, document: bytes, marks: Mapping[str, Mark]) -> None:
        """Replace a document and all marks at once, unless another look was quicker and found something newer."""

        def write(connection: Connection) -> None:
            stored = _marks(connection)
            result = merged(stored, marks)
            if result.get(role) == marks[role] or role not in stored:
                connection.execute("REPLACE INTO trust_documents (role, document) VALUES (?, ?)", (role, document))
            connection.execute("DELETE FROM trust_marks")
            connection.executemany(
                "INSERT INTO trust_marks (role, version, issued) VALUES (?, ?, ?)",
                [(name, mark.version, mark.issued) for name, mark in result.items()],
            )

        await self._database.write(write)

    def file(self, digest: str) -> bytes | None:
        """Return the content of a verified file, unchecked: the disk may have damaged it."""
        row = self._database.read(
            lambda each: each.execute("SELECT content FROM trust_files WHERE digest = ?", (digest,)).fetchone()
        )
        return None if row is None else bytes(row["content"])

    async def keep_file(self, digest: str, content: bytes) -> None:
        """Keep a verified file; of many, those kept last."""

        def write(connection: Connection) -> None:
            connection.execute(
                "REPLACE INTO trust_files (digest, used, content) "
                "VALUES (?, (SELECT coalesce(max(used), 0) + 1 FROM trust_files), ?)",
                (digest, content),
            )
            connection.execute(
                "DELETE FROM trust_files WHERE digest NOT IN "
                "(SELECT digest FROM trust_files ORDER BY used DESC LIMIT ?)",
                (FILES_KEPT,),
            )

        await self._database.write(write)

    async def see(self, kind: str, version: int) -> None:
        """Note the version of a job or a desired twin.

        Raises:
            UntrustedError: A newer one was seen before; nothing was changed.
        """

        def write(connection: Connection) -> None:
            row = connection.execute("SELECT version FROM trust_seen WHERE kind = ?", (kind,)).fetchone()
            if row is not None and version < row["version"]:
                raise UntrustedError(
                    f"The hub's {kind} has version {version}, and version {row['version']} was seen before.",
                    advice="An old one was sent again. If the hub was restored from a backup, let it count on.",
                    code="document_old",
                )
            connection.execute("REPLACE INTO trust_seen (kind, version) VALUES (?, ?)", (kind, version))

        await self._database.write(write)


def _marks(connection: Connection) -> dict[str, Mark]:
    rows = connection.execute("SELECT role, version, issued FROM trust_marks")
    return {each["role"]: Mark(each["version"], each["issued"]) for each in rows}
