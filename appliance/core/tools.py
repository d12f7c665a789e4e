"""Tools that a model may call, and its calls. The forms on the wire are the doors' business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may ask for.

    Attributes:
        name: Letters, digits, `_` and `-`, at most 64.
        parameters: JSON Schema of its arguments, an object; empty takes none.
        strict: Whether the schema is one of OpenAI's strict ones; arguments satisfy it in either case.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may (`auto`), must (`required`) or must not (`none`) call; `names` leaves it only those."""

    mode: Literal["auto", "required", "none"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call.

    Attributes:
        id: `call_` and 24 letters and digits.
        arguments: A JSON object that satisfies the tool's schema.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What one call of a choice gained; id and name come with its first delta only, "" behind it.

    Attributes:
        index: The call's place among its choice's, from 0.
    """

    index: int
    arguments: str
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What became of a call, as the model is told.

    Attributes:
        kind: What happened; all but `ok` are typed failures that the model may answer.
        output: What the model reads, cut to the loop's limit.
        details: What the client may read beside it (search results, rows), for the item on the wire.
    """

    kind: Literal["ok", "unknown_tool", "bad_arguments", "failed", "timeout", "refused"]
    output: str
    details: Mapping[str, Any] = field(default_factory=dict)


class BuiltInTool(Protocol):
    """A tool, or a server of several, that the box itself runs."""

    @property
    def label(self) -> str:
        """Return what it is called in errors and items: `file_search`, `sql`, an MCP server's label."""
        ...

    @property
    def tools(self) -> Sequence[Tool]:
        """Return what the model is offered."""
        ...

    def needs_approval(self, name: str) -> bool:
        """Return whether a person must agree before the tool of that name runs."""
        ...

    async def call(
        self, name: str, arguments: Mapping[str, Any], *, tenant: str, deadline_s: float, request_id: str
    ) -> ToolResult:
        """Run a tool. Every failure is a result; only a cancellation is raised.

        Args:
            name: One of `tools`.
            arguments: What the model gave; they satisfy the schema.
            tenant: On whose behalf.
            deadline_s: Seconds from now after which the result is a timeout.
            request_id: For the log.
        """
        ...


@runtime_checkable
class ListsTools(Protocol):
    """A built-in tool whose tools are those of a server, which the client is told of."""

    @property
    def listing(self) -> Mapping[str, Any]:
        """Return the item `mcp_list_tools`, without an id."""
        ...


@runtime_checkable
class NumbersPassages(Protocol):
    """A built-in tool that numbers what it finds, each number once in a conversation."""

    def number_from(self, number: int) -> None:
        """Give the next passage that number; those below it have been given."""
        ...
