"""Built-in tools for tests, good and bad, behind the real interface."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.agents.registry import ToolRegistry
from appliance.core.errors import UnavailableError
from appliance.core.tools import BuiltInTool, Tool, ToolResult

QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "additionalProperties": False}

Does = Callable[[Mapping[str, Any]], Awaitable[Any]]


@dataclass(slots=True)
class Box:
    """One tool that does what a test says, and notes its calls.

    Attributes:
        calls: Arguments of every call.
        ended: How many calls came to an end, whichever.
    """

    name: str
    does: Does
    label: str = "box"
    guarded: bool = False
    calls: list[Mapping[str, Any]] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: int = 0

    @property
    def tools(self) -> Sequence[Tool]:
        return [Tool(self.name, "For tests.", QUERY)]

    def needs_approval(self, name: str) -> bool:
        return self.guarded

    async def call(
        self, name: str, arguments: Mapping[str, Any], *, tenant: str, deadline_s: float, request_id: str
    ) -> ToolResult:
        self.calls.append(arguments)
        self.tenants.append(tenant)
        self.begun.set()
        try:
            result: ToolResult = await self.does(arguments)
            return result
        finally:
            self.ended += 1


async def echo(arguments: Mapping[str, Any]) -> Any:
    return ToolResult("ok", f"found {arguments.get('query', 'nothing')}")


async def hang(arguments: Mapping[str, Any]) -> Any:
    await asyncio.Event().wait()


async def flood(arguments: Mapping[str, Any]) -> Any:
    return ToolResult("ok", "界" * 3_000_000)


async def html(arguments: Mapping[str, Any]) -> Any:
    return ToolResult("ok", "<html><script>alert(1)</script>\x00\ud800</html>")


async def lie(arguments: Mapping[str, Any]) -> Any:
    return ToolResult("ok", "four", {"length": 10**12, "content-length": -1, "body": object()})


async def nonsense(arguments: Mapping[str, Any]) -> Any:
    return "no result at all"


async def odd(arguments: Mapping[str, Any]) -> Any:
    return ToolResult("ok", 7)  # type: ignore[arg-type]


async def raises(arguments: Mapping[str, Any]) -> Any:
    raise RuntimeError("a secret of the tool")


async def unavailable(arguments: Mapping[str, Any]) -> Any:
    raise UnavailableError("The server does not answer.", advice="Try later.")


async def refuse(arguments: Mapping[str, Any]) -> Any:
    return ToolResult("refused", "not from here")


def registry(*boxes: Box) -> ToolRegistry:
    """Return a registry in which each tool's type is its name."""

    def factory(box: Box) -> Any:
        async def make(definition: Mapping[str, Any], *, tenant: str, request_id: str) -> BuiltInTool:
            return box

        return make

    return ToolRegistry({each.name: factory(each) for each in boxes})
