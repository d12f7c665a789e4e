"""Whatever is done to conversations, they are what plain lists would be, and nothing is kept that nobody has."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from appliance.core.errors import ConflictError
from appliance.sessions.conversations import StoredConversations
from appliance.sessions.erasure import Erasure
from appliance.sessions.schema import MIGRATIONS
from appliance.store.database import Database
from tests.sessions.boxes import HandClock, nothing_to_forget, said, texts

T = TypeVar("T")


@dataclass
class Plain:
    """A conversation as a list of ids; each item's text is its id."""

    items: list[str]


class LedgerMachine(RuleBasedStateMachine):
    """Runs each action on the ledger and on the lists."""

    conversations: Bundle[str] = Bundle("conversations")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.database = Database(
            self.folder / "sessions.db", migrations=MIGRATIONS, overwrite_deleted=True, durable=False
        )
        self.ledger = StoredConversations(self.database, HandClock(), Erasure(self.database, nothing_to_forget))
        self.plain: dict[str, Plain] = {}
        self.count = 0

    def teardown(self) -> None:
        self.database.close()
        shutil.rmtree(self.folder)

    def run(self, action: Any) -> Any:
        return asyncio.run(action)

    def new_items(self, count: int) -> list[dict[str, Any]]:
        self.count += count
        names = [f"word{number}" for number in range(self.count - count, self.count)]
        return [said(name, name) for name in names]

    @rule(target=conversations, count=st.integers(0, 3))
    def create(self, count: int) -> str:
        items = self.new_items(count)
        made = self.run(self.ledger.create(tenant="a", items=items))
        self.plain[made.id] = Plain([each["id"] for each in items])
        return str(made.id)

    @rule(name=conversations, count=st.integers(0, 3), again=st.booleans())
    def append(self, name: str, count: int, again: bool) -> None:
        items = self.new_items(count)
        plain = self.plain[name]
        old = [said("another text", each) for each in plain.items[-1:]] if again else []
        self.run(self.ledger.append(name, [*old, *items], tenant="a"))
        plain.items += [each["id"] for each in items]

    @rule(target=conversations, name=conversations, data=st.data())
    def fork(self, name: str, data: st.DataObject) -> str:
        plain = self.plain[name]
        place = data.draw(st.integers(0, len(plain.items)))
        at = None if place == len(plain.items) else plain.items[place - 1] if place else ""
        made = self.run(self.ledger.fork(name, tenant="a", at=at))
        self.plain[made.id] = Plain(plain.items[:place])
        return str(made.id)

    @rule(target=conversations, name=conversations, data=st.data())
    def append_behind(self, name: str, data: st.DataObject) -> Any:
        """Append behind any item: to the conversation if it is the last, else to a fork after a refusal."""
        plain = self.plain[name]
        place = data.draw(st.integers(0, len(plain.items)))
        after = plain.items[place - 1] if place else ""
        items = self.new_items(1)
        try:
            got, _ = self.run(self.ledger.append(name, items, tenant="a", after=after))
        except ConflictError:
            assert place < len(plain.items)
            got, _ = self.run(self.ledger.append(name, items, tenant="a", after=after, fork=True))
            assert got.id != name
            self.plain[got.id] = Plain(plain.items[:place])
        self.plain[got.id].items.append(items[0]["id"])
        return multiple() if got.id == name else got.id

    @rule(name=conversations, data=st.data())
    def remove(self, name: str, data: st.DataObject) -> None:
        plain = self.plain[name]
        if plain.items:
            item = data.draw(st.sampled_from(plain.items))
            self.run(self.ledger.remove_item(name, item, tenant="a"))
            plain.items.remove(item)

    @rule(name=consumes(conversations))
    def delete(self, name: str) -> None:
        del self.plain[name]
        self.run(self.ledger.delete(name, tenant="a"))

    @invariant()
    def each_conversation_is_its_list(self) -> None:
        for name, plain in self.plain.items():
            items, _ = self.ledger.items(name, tenant="a")
            assert [each["id"] for each in items] == texts(items) == plain.items
            assert self.ledger.get(name, tenant="a").last == (plain.items[-1] if plain.items else "")
            assert self.ledger.wrong(name, tenant="a") == ""
            page, more = self.ledger.items(name, tenant="a", limit=2, newest_first=True)
            assert ([each["id"] for each in page], more) == (plain.items[::-1][:2], len(plain.items) > 2)

    @invariant()
    def nothing_is_kept_that_nobody_has(self) -> None:
        held = {item for plain in self.plain.values() for item in plain.items}
        rows = self.database.read(
            lambda each: each.execute("SELECT id FROM messages WHERE item IS NOT NULL").fetchall()
        )
        assert {name for (name,) in rows} == held
        found = self.database.read(lambda each: each.execute("SELECT terms FROM search").fetchall())
        assert sorted(terms.split()[0] for (terms,) in found) == sorted(held)
        if not self.plain:
            assert self.database.read(lambda each: each.execute("SELECT count(*) FROM lines").fetchone()[0]) == 0

    @invariant()
    def what_is_held_is_found_where_it_is(self) -> None:
        for name, plain in list(self.plain.items())[:1]:
            for item in plain.items[:1]:
                assert texts(self.ledger.memory(name, item, tenant="a", before="", limit=1)) == [item]
                [found] = self.ledger.search(item, tenant="a", limit=1)
                assert item in self.plain[found.conversation].items


LedgerMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
