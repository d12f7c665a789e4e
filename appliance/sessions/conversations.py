"""Conversations in `sessions.db`. See `core.sessions.Conversations`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError
from appliance.core.sessions import Conversation, Found, Item, Summary
from appliance.sessions import history as ledger
from appliance.sessions import recall, transfer
from appliance.sessions.append import append, make
from appliance.sessions.append import fork as begin_fork
from appliance.sessions.erasure import Erasure
from appliance.sessions.history import History
from appliance.sessions.removal import remove_conversation, remove_item
from appliance.sessions.rows import conversation_page, encoded, to_conversation
from appliance.store.database import Connection, Database

T = TypeVar("T")


class StoredConversations:
    """The conversations."""

    def __init__(self, database: Database, clock: Clock, erasure: Erasure) -> None:
        """Keep conversations in `sessions.db`."""
        self._database = database
        self._clock = clock
        self._erasure = erasure

    # What is said of a conversation

    async def create(
        self, *, tenant: str, items: Sequence[Item] = (), metadata: Mapping[str, str] | None = None, title: str = ""
    ) -> Conversation:
        """Begin a conversation; items without an id are given one."""
        now = self._now()

        def write(connection: Connection) -> Conversation:
            row = make(connection, tenant=tenant, now=now, title=title, metadata=metadata)
            return to_conversation(append(connection, row, items, now=now)[0])

        return await self._database.write(write)

    def get(self, conversation: str, *, tenant: str) -> Conversation:
        """Return a conversation."""
        return self._database.read(lambda each: to_conversation(ledger.conversation_row(each, conversation, tenant)))

    def list(self, *, tenant: str, limit: int, after: str, newest_first: bool) -> tuple[Sequence[Conversation], bool]:
        """Return conversations by their last change, and whether there are more."""

        def read(connection: Connection) -> tuple[Sequence[Conversation], bool]:
            row = ledger.conversation_row(connection, after, tenant) if after else None
            return conversation_page(connection, tenant, row, limit=limit, newest_first=newest_first)

        return self._database.read(read)

    async def change(
        self, conversation: str, *, tenant: str, metadata: Mapping[str, str] | None = None, title: str | None = None
    ) -> Conversation:
        """Change what is said of a conversation; None leaves a value as it is."""
        now = self._now()

        def write(connection: Connection) -> Conversation:
            row = ledger.conversation_row(connection, conversation, tenant)
            values = (title, None if metadata is None else encoded(metadata), now, row["key"])
            sql = "UPDATE conversations SET title = coalesce(?, title), metadata = coalesce(?, metadata), updated = ?"
            connection.execute(f"{sql} WHERE key = ?", values)
            return to_conversation(ledger.conversation_row(connection, conversation, tenant))

        return await self._database.write(write)

    async def delete(self, conversation: str, *, tenant: str) -> None:
        """Erase a conversation, its responses included; see `core.sessions.Conversations.delete`."""
        await self._erasure.erase(
            lambda each: remove_conversation(each, ledger.conversation_row(each, conversation, tenant))
        )

    # Items

    async def append(
        self, conversation: str, items: Sequence[Item], *, tenant: str, after: str | None = None, fork: bool = False
    ) -> tuple[Conversation, Sequence[Item]]:
        """Append items; see `core.sessions.Conversations.append`."""
        now = self._now()

        def write(connection: Connection) -> tuple[Conversation, Sequence[Item]]:
            row = ledger.conversation_row(connection, conversation, tenant)
            longer, kept = append(connection, row, items, now=now, after=after, fork_instead=fork)
            return to_conversation(longer), kept

        return await self._database.write(write)

    def items(
        self, conversation: str, *, tenant: str, limit: int | None = None, after: str = "", newest_first: bool = False
    ) -> tuple[Sequence[Item], bool]:
        """Return items, and whether there are more; no limit is all."""

        def read(connection: Connection, history: History) -> tuple[Sequence[Item], bool]:
            low, high = 0, None
            if after:
                position = ledger.message(connection, history, after)["position"]
                low, high = (0, position - 1) if newest_first else (position, None)
            rows = [
                *ledger.messages(
                    connection,
                    history,
                    limit=None if limit is None else limit + 1,
                    low=low,
                    high=high,
                    newest_first=newest_first,
                )
            ]
            return [ledger.item_of(each) for each in rows[:limit]], limit is not None and len(rows) > limit

        return self._read(conversation, tenant, read)

    def item(self, conversation: str, item: str, *, tenant: str) -> Item:
        """Return one item."""
        return self._read(
            conversation, tenant, lambda each, history: ledger.item_of(ledger.message(each, history, item))
        )

    async def remove_item(self, conversation: str, item: str, *, tenant: str) -> Conversation:
        """Erase one item of a conversation; forks that hold it keep it."""
        await self._erasure.erase(lambda each: remove_item(each, conversation, item, tenant))
        return self.get(conversation, tenant=tenant)

    async def fork(self, conversation: str, *, tenant: str, at: str | None = None) -> Conversation:
        """Begin a conversation with the past of another up to the item `at`, or all of it; nothing is copied."""
        now = self._now()

        def write(connection: Connection) -> Conversation:
            row = ledger.conversation_row(connection, conversation, tenant)
            return to_conversation(begin_fork(connection, row, at, now=now))

        return await self._database.write(write)

    # Finding

    def search(self, query: str, *, tenant: str, limit: int) -> Sequence[Found]:
        """Return items of one's own conversations in which the query's words stand, best first."""
        return self._database.read(lambda each: recall.search(each, query, tenant=tenant, limit=limit))

    def memory(self, conversation: str, query: str, *, tenant: str, before: str, limit: int) -> Sequence[Item]:
        """Return items of one conversation older than the item `before` that the query's words speak of, best first."""
        return self._read(
            conversation,
            tenant,
            lambda each, history: recall.memory(each, history, query, before=before, limit=limit),
        )

    # Summaries

    def summary(self, conversation: str, *, tenant: str) -> Summary | None:
        """Return the newest summary that covers only items which the conversation still has."""
        sql = "SELECT until, text, model FROM summaries WHERE line = ? ORDER BY position DESC LIMIT 1"

        def read(connection: Connection, history: History) -> Summary | None:
            row = connection.execute(sql, (history.line,)).fetchone()
            return None if row is None else Summary(*row)

        return self._read(conversation, tenant, read)

    async def keep_summary(
        self, conversation: str, summary: Summary, *, tenant: str, covered: int | None = None
    ) -> None:
        """Keep a summary; see `core.sessions.Conversations.keep_summary`."""

        def write(connection: Connection) -> None:
            history = ledger.history_of(connection, ledger.conversation_row(connection, conversation, tenant))
            position = ledger.message(connection, history, summary.until)["position"]
            if covered is not None and sum(1 for _ in ledger.messages(connection, history, high=position)) != covered:
                raise ConflictError("An item was removed from the conversation while its summary was written.")
            connection.execute(
                "INSERT OR REPLACE INTO summaries (line, position, until, text, model) VALUES (?, ?, ?, ?, ?)",
                (history.line, position, summary.until, summary.text, summary.model),
            )

        await self._database.write(write)

    # In and out

    def export(self, conversation: str, *, tenant: str) -> Mapping[str, Any]:
        """Return all of a conversation as a JSON object, for `import_`."""

        def read(connection: Connection) -> Mapping[str, Any]:
            row = ledger.conversation_row(connection, conversation, tenant)
            rows = ledger.messages(connection, ledger.history_of(connection, row))
            return transfer.exported(to_conversation(row), [ledger.item_of(each) for each in rows])

        return self._database.read(read)

    async def import_(self, document: Mapping[str, Any], *, tenant: str) -> Conversation:
        """Make a conversation of what `export` returned; see `core.sessions.Conversations.import_`."""
        given = transfer.checked(document)
        return await self.create(tenant=tenant, items=given.items, metadata=given.metadata, title=given.title)

    def wrong(self, conversation: str, *, tenant: str) -> str:
        """Return what is wrong with the hashes of a conversation's messages, "" if nothing is."""
        return self._read(conversation, tenant, ledger.wrong)

    def _read(self, conversation: str, tenant: str, function: Callable[[Connection, History], T]) -> T:
        def read(connection: Connection) -> T:
            row = ledger.conversation_row(connection, conversation, tenant)
            return function(connection, ledger.history_of(connection, row))

        return self._database.read(read)

    def _now(self) -> int:
        return int(self._clock.unix())
