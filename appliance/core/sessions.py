"""Conversations, responses and what their loop remembers. Times are Unix seconds; items are OpenAI's, as JSON objects.

What belongs to an API key is seen and changed by that key alone: every call names the tenant, "" on an open server.
Reads return at once; what is `async` returns when it is on the disk. Every call raises NotFoundError for what the
tenant does not have, and StorageError when the disk fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Item = Mapping[str, Any]
"""A message, a tool call, its output, … with an `id` and a `type`, as on `/v1/responses` and `/v1/conversations`."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation.

    Attributes:
        id: `conv_` and 24 letters and digits.
        title: As its owner calls it; "" until then.
        last: Id of its newest item, or "".
        forked_from: Id of the conversation it was forked from, or "".
    """

    id: str
    created: int
    updated: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    last: str = ""
    forked_from: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """An item that a search over one's own history found; `text` is the passage around it."""

    conversation: str
    item: Item
    text: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What stands for the oldest items of a history when it does not fit: written by a model, so it can be redone.

    Attributes:
        until: Id of the last item that it covers.
        model: The full name of the model that wrote it.
    """

    until: str
    text: str
    model: str


class Conversations(Protocol):
    """Durable conversations."""

    async def create(
        self, *, tenant: str, items: Sequence[Item] = (), metadata: Mapping[str, str] | None = None, title: str = ""
    ) -> Conversation:
        """Begin a conversation; items without an id are given one."""
        ...

    def get(self, conversation: str, *, tenant: str) -> Conversation:
        """Return a conversation."""
        ...

    def list(self, *, tenant: str, limit: int, after: str, newest_first: bool) -> tuple[Sequence[Conversation], bool]:
        """Return conversations by their last change, and whether there are more."""
        ...

    async def change(
        self, conversation: str, *, tenant: str, metadata: Mapping[str, str] | None = None, title: str | None = None
    ) -> Conversation:
        """Change what is said of a conversation; None leaves a value as it is."""
        ...

    async def delete(self, conversation: str, *, tenant: str) -> None:
        """Erase a conversation with its responses: no byte of what only it holds is left when this returns."""
        ...

    async def append(
        self, conversation: str, items: Sequence[Item], *, tenant: str, after: str | None = None, fork: bool = False
    ) -> tuple[Conversation, Sequence[Item]]:
        """Append items; an item whose id is there already is not appended again, so an append can be repeated.

        Args:
            conversation: Its id.
            items: OpenAI's input items.
            tenant: Whose it is.
            after: Id of the newest item that the caller knows of, "" if there was none, or None to append whatever was
                appended meanwhile.
            fork: Where another was appended behind `after`, continue in a fork from there instead of refusing.

        Returns:
            The conversation, or the fork, and the items with their ids.

        Raises:
            ConflictError: Another item was appended behind `after`.
            InvalidRequestError: An item has no type, or its id is none.
        """
        ...

    def items(
        self, conversation: str, *, tenant: str, limit: int | None = None, after: str = "", newest_first: bool = False
    ) -> tuple[Sequence[Item], bool]:
        """Return items, and whether there are more; no limit is all."""
        ...

    def item(self, conversation: str, item: str, *, tenant: str) -> Item:
        """Return one item."""
        ...

    async def remove_item(self, conversation: str, item: str, *, tenant: str) -> Conversation:
        """Erase one item of a conversation and of the response that said it; forks that hold it keep it.

        Summaries that cover it go as well, and the journal and events of that response.
        """
        ...

    async def fork(self, conversation: str, *, tenant: str, at: str | None = None) -> Conversation:
        """Begin a conversation with the past of another up to the item `at`, or all of it; no item is copied."""
        ...

    def search(self, query: str, *, tenant: str, limit: int) -> Sequence[Found]:
        """Return items of one's own conversations in which the query's words stand, best first."""
        ...

    def memory(self, conversation: str, query: str, *, tenant: str, before: str, limit: int) -> Sequence[Item]:
        """Return items of one conversation older than the item `before` that the query's words speak of, best first.

        `before` may be "", for all items.
        """
        ...

    def summary(self, conversation: str, *, tenant: str) -> Summary | None:
        """Return the newest summary that covers only items which the conversation still has."""
        ...

    async def keep_summary(
        self, conversation: str, summary: Summary, *, tenant: str, covered: int | None = None
    ) -> None:
        """Keep a summary.

        Args:
            conversation: Its id.
            summary: The summary.
            tenant: Whose it is.
            covered: How many items it was written of, if that is to be checked.

        Raises:
            NotFoundError: The conversation, or the last item that it covers, is gone.
            ConflictError: Other items are there now than it was written of.
        """
        ...

    def export(self, conversation: str, *, tenant: str) -> Mapping[str, Any]:
        """Return all of a conversation as a JSON object, for `import_`."""
        ...

    async def import_(self, document: Mapping[str, Any], *, tenant: str) -> Conversation:
        """Make a conversation of what `export` returned, under a new id; its items keep theirs.

        Raises:
            InvalidRequestError: It is not what `export` returns.
        """
        ...


ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it is kept.

    Attributes:
        id: `resp_` and 24 letters and digits.
        request: The request's fields as JSON, as the door checked them: enough to begin again after a restart.
        body: The response object as the client last would have seen it, as JSON.
        input: The input items of this turn, with ids.
        previous: Id of the response before it, or "".
        conversation: Id of the conversation that it belongs to, or "".
        background: Whether it goes on without a client.
    """

    id: str
    created: int
    status: ResponseStatus
    request: Mapping[str, Any]
    body: Mapping[str, Any]
    input: Sequence[Item]
    previous: str = ""
    conversation: str = ""
    background: bool = False
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a response's journal, kept before it acts: what a model said, what a tool is asked, what it said.

    Attributes:
        number: From 0, without holes.
        kind: What it is.
        data: JSON.
    """

    number: int
    kind: Literal["model", "call", "result"]
    data: Mapping[str, Any]


class Responses(Protocol):
    """Durable responses, the journal of their loop, and their events for those who come back to a stream."""

    async def begin(self, response: StoredResponse) -> None:
        """Keep a new response, before any work is done for it.

        Raises:
            NotFoundError: The tenant has no such previous response, or no such conversation.
            ConflictError: The id is taken.
        """
        ...

    async def add_step(self, response: str, step: Step) -> None:
        """Keep a step before it acts. Raises ConflictError if its number is there already."""
        ...

    def steps(self, response: str) -> Sequence[Step]:
        """Return the journal, oldest first."""
        ...

    async def add_events(self, response: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Keep events of its stream; each has a `sequence_number`."""
        ...

    def events(self, response: str, *, tenant: str, after: int = -1) -> Sequence[Mapping[str, Any]]:
        """Return the events behind a sequence number."""
        ...

    async def end(
        self,
        response: str,
        status: ResponseStatus,
        body: Mapping[str, Any],
        *,
        append: Sequence[Item] = (),
        after: str | None = None,
        fork: bool = False,
        events: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any]:
        """Keep how it ended; in the same transaction append items to its conversation, if it has one, and last events.

        A response ends once: a second end is ConflictError, and changes nothing.

        Args:
            response: Its id.
            status: How it ended.
            body: The response object.
            append: What its conversation gains.
            after: The item that is to be the conversation's last, if that is to be checked.
            fork: If it is not, append to a fork from there; the response belongs to that from then on.
            events: Its last ones.

        Returns:
            The response object as it is kept: it names the fork if there is one.

        Raises:
            ConflictError: It has ended, or its conversation has another item behind `after`.
            NotFoundError: It was deleted, or its conversation was, which takes its responses along.
        """
        ...

    def get(self, response: str, *, tenant: str) -> StoredResponse:
        """Return one response."""
        ...

    def past(self, response: str, *, tenant: str) -> Sequence[Item]:
        """Return input and output items of a response and of all before it, oldest first, without what was deleted."""
        ...

    def unfinished(self) -> Sequence[StoredResponse]:
        """Return what was queued or in progress when the process ended, of all tenants, oldest first."""
        ...

    def first(self, response: str, *, tenant: str) -> str:
        """Return the id of the first of the responses that a response follows, or its own."""
        ...

    async def delete(self, response: str, *, tenant: str) -> None:
        """Erase a response; those that followed it keep their own items."""
        ...
