"""The kinds of built-in tools, by the `type` that requests give them."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

from appliance.core.errors import InvalidRequestError
from appliance.core.tools import BuiltInTool


class ToolFactory(Protocol):
    """Makes the tool that a definition of its type describes. Raises as `core.agents.BuiltInTools.open`."""

    def __call__(self, definition: Mapping[str, Any], *, tenant: str, request_id: str) -> Awaitable[BuiltInTool]:
        """Return the tool."""
        ...


class ToolRegistry:
    """Answers `core.agents.BuiltInTools`."""

    def __init__(self, factories: Mapping[str, ToolFactory]) -> None:
        """Take the factories by type."""
        self._factories = dict(factories)

    @property
    def types(self) -> Sequence[str]:
        """Return the types that there are."""
        return tuple(self._factories)

    async def open(self, definition: Mapping[str, Any], *, tenant: str, request_id: str) -> BuiltInTool:
        """Return the tool that a request describes; see `core.agents.BuiltInTools.open`."""
        kind = str(definition.get("type"))
        factory = self._factories.get(kind)
        if factory is None:  # of a request that was kept before this program lost the type
            raise InvalidRequestError(
                f"There is no tool of the type {kind[:100]!r}.", param="tools", code="unsupported_parameter"
            )
        return await factory(definition, tenant=tenant, request_id=request_id)
