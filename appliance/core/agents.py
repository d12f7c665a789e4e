"""Responses as their door and the room that carries them out see them. Items and events are OpenAI's, as JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from appliance.core.sessions import Item
from appliance.core.tools import BuiltInTool, Tool, ToolChoice
from appliance.core.types import Priority, SamplingParams

Event = Mapping[str, Any]
"""One event of a response's stream, with its `type` and its `sequence_number`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A request to `/v1/responses`, checked. It can be written as JSON and read again after a restart.

    Attributes:
        input: The new items, with ids.
        functions: Tools that the client runs.
        built_in: Tools that the box runs, as the client describes them.
        tool_choice: Names may be those of tools, and `@` with the label of a built-in one, for all that it has.
        max_tool_calls: Most calls of built-in tools, or None.
        previous: Id of the response that this one follows, or "".
        conversation: Id of the conversation that it belongs to, or "".
        after: Id of that conversation's newest item when the turn began, or "".
        fork: Where another was quicker in that conversation, go on in a fork of it instead of refusing.
        include: What beside the usual the items show, in OpenAI's words.
        shown: Fields of the response object that repeat the request.
    """

    model: str
    input: tuple[Mapping[str, Any], ...]
    sampling: SamplingParams
    instructions: str = ""
    functions: tuple[Tool, ...] = ()
    built_in: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None
    previous: str = ""
    conversation: str = ""
    after: str = ""
    fork: bool = False
    store: bool = True
    stream: bool = False
    background: bool = False
    include: tuple[str, ...] = ()
    truncation: Literal["auto", "disabled"] = "disabled"
    tenant: str = ""
    weight: float = 1.0
    pinned: bool = False
    priority: Priority = Priority.DEFAULT
    deadline_s: float | None = None
    request_id: str = ""
    shown: Mapping[str, Any] = field(default_factory=dict)


class BuiltInTools(Protocol):
    """The kinds of tools that the box itself can run, by the `type` that requests give them."""

    @property
    def types(self) -> Sequence[str]:
        """Return the types that there are."""
        ...

    async def open(self, definition: Mapping[str, Any], *, tenant: str, request_id: str) -> BuiltInTool:
        """Return the tool that a request describes.

        Raises:
            InvalidRequestError: The definition will not do.
            NotFoundError: What it names is not the tenant's.
            UnavailableError: What it names does not answer.
        """
        ...


class Answer(Protocol):
    """A response that runs, or one that has ended."""

    @property
    def streamed(self) -> bool:
        """Return whether it was created as a stream, so that its events are kept."""
        ...

    @property
    def body(self) -> Mapping[str, Any]:
        """Return the response object as it is now."""
        ...

    def events(self, after: int = -1, *, silence_s: float | None = None) -> AsyncIterator[Sequence[Event]]:
        """Yield the events behind a sequence number as they come, several at once, up to the last.

        Args:
            after: Its number; -1 is all.
            silence_s: Time without any after which none are yielded; None is never.
        """
        ...

    async def whole(self) -> Mapping[str, Any]:
        """Wait for the end, and return the response object.

        Raises:
            ApplianceError: It failed.
        """
        ...

    def cancel(self) -> None:
        """End it soon, without an answer. Idempotent; nothing happens to one that has ended."""
        ...


class Agents(Protocol):
    """Whatever answers requests to `/v1/responses`."""

    @property
    def tool_types(self) -> Sequence[str]:
        """Return the types of built-in tools that there are."""
        ...

    async def create(self, turn: Turn) -> Answer:
        """Begin a response; one in the foreground has been accepted by its model when this returns.

        Raises:
            NotFoundError: The model, the conversation, the previous response or a tool's store is not there.
            InvalidRequestError: The input does not fit the model, or a tool will not do.
            ConflictError: Another response works on the conversation.
            ApplianceError: As `TextModels.generate`.
        """
        ...

    def find(self, response: str, *, tenant: str) -> Answer:
        """Return a response. Raises NotFoundError."""
        ...

    async def cancel(self, response: str, *, tenant: str) -> Mapping[str, Any]:
        """End a background response, and return it as it then is.

        Raises:
            NotFoundError: There is none.
            InvalidRequestError: It is not a background response, or has ended otherwise.
        """
        ...

    async def delete(self, response: str, *, tenant: str) -> None:
        """Erase a response; one that runs is ended first. Raises NotFoundError."""
        ...

    def input_items(self, response: str, *, tenant: str) -> Sequence[Item]:
        """Return the items that a response answers, those of the turns before it included, oldest first."""
        ...
