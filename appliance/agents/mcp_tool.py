"""The tool `mcp`: the tools of a remote MCP server, with OpenAI's parameters.

    {"type": "mcp", "server_label": "shop", "server_url": "https://shop.example/mcp", "authorization": "…",
     "allowed_tools": ["find_order"], "require_approval": {"never": {"tool_names": ["find_order"]}}}

Only servers that the operator allows are visited. Credentials are used for the one request and never kept, so a
response that has some is not taken up after a restart.
"""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.agents.definitions import bad_definition, read_definition
from appliance.core.errors import ApplianceError, DeadlineExceededError, UnavailableError
from appliance.core.tools import Tool, ToolResult

if TYPE_CHECKING:
    from appliance.agents.mcp_client import McpServer, ServerTool

KIND = "mcp"
RESERVED = ("file_search", "sql", "unknown")
MOST_OFFERED = 64
MOST_DESCRIPTION = 1024
MOST_SCHEMA_BYTES = 32 * 1024
MOST_SCHEMA_DEPTH = 32
MOST_HEADERS = 32

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_OURS = ("host", "connection", "content-length", "content-type", "transfer-encoding", "accept", "accept-encoding", "te")


class ToolFilter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some tools of a server; both conditions must hold where both are given."""

    tool_names: list[str] | None = None
    read_only: bool | None = None

    def takes(self, tool: ServerTool) -> bool:
        """Return whether a tool is one of them; whether it only reads is what its server says."""
        is_named = self.tool_names is None or tool.name in self.tool_names
        return is_named and self.read_only in (None, tool.annotations.get("readOnlyHint") is True)


class Approval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which tools need a person's approval: those that `never` does not name, and those that `always` names."""

    always: ToolFilter | None = None
    never: ToolFilter | None = None


class McpDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tool as a request describes it."""

    type: Literal["mcp"]
    server_label: Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")]
    server_url: Annotated[str, Meta(max_length=2048)]
    server_description: Annotated[str, Meta(max_length=10_000)] | None = None
    authorization: Annotated[str, Meta(max_length=16_384)] | None = None
    headers: dict[str, Annotated[str, Meta(max_length=16_384)]] | None = None
    allowed_tools: list[str] | ToolFilter | None = None
    require_approval: Literal["always", "never"] | Approval | None = None
    credentials_left_out: bool = False


class McpTools:
    """Makes the tool; an `agents.registry.ToolFactory`."""

    def __init__(self, allowed: Collection[str], timeout_s: float) -> None:
        """Take the URLs that may be visited, and the longest time of a visit."""
        self._allowed = frozenset(allowed)
        self._timeout_s = timeout_s

    async def __call__(self, definition: Mapping[str, Any], *, tenant: str, request_id: str) -> McpTool:
        """Visit the server, and return the tool for a request."""
        del tenant, request_id
        wanted = read_definition(definition, McpDefinition)
        self._check(wanted)
        client = await asyncio.to_thread(importlib.import_module, "appliance.agents.mcp_client")
        server: McpServer = client.McpServer(wanted.server_label, wanted.server_url, headers_of(wanted))
        tools = offered(wanted, await server.tools(deadline_s=self._timeout_s))
        return McpTool(wanted, server, tools, self._timeout_s)

    def _check(self, wanted: McpDefinition) -> None:
        if wanted.server_url not in self._allowed:
            raise bad_definition(
                KIND,
                f"the server_url of {wanted.server_label!r} is not among those that `mcp_servers` allows here. "
                "The operator may add it.",
            )
        if wanted.server_label in RESERVED:
            raise bad_definition(KIND, f"the server_label {wanted.server_label!r} is that of a tool of the box.")
        if wanted.credentials_left_out:
            raise UnavailableError(
                f"The credentials for the MCP server {wanted.server_label!r} ended with the process that had them.",
                advice="Ask again.",
            )


class McpTool:
    """Calls a server's tools; a `core.tools.BuiltInTool`."""

    def __init__(
        self, wanted: McpDefinition, server: McpServer, tools: Mapping[str, ServerTool], timeout_s: float
    ) -> None:
        self._wanted = wanted
        self._server = server
        self._tools = tools
        self._timeout_s = timeout_s

    @property
    def label(self) -> str:
        """Return the server's label."""
        return self._wanted.server_label

    @property
    def tools(self) -> Sequence[Tool]:
        """Return the tools that the request allows."""
        return [
            Tool(name, each.description[:MOST_DESCRIPTION], each.schema) for name, each in sorted(self._tools.items())
        ]

    @property
    def listing(self) -> Mapping[str, Any]:
        """Return the item that tells the client of the tools."""
        tools = [
            {
                "name": each.name,
                "description": each.description,
                "input_schema": each.parameters,
                "annotations": self._tools[each.name].annotations,
            }
            for each in self.tools
        ]
        return {"type": "mcp_list_tools", "server_label": self.label, "tools": tools}

    def needs_approval(self, name: str) -> bool:
        """Return whether a person must agree, as the request says; always where it says nothing."""
        return is_guarded(self._wanted.require_approval, self._tools[name])

    async def call(
        self, name: str, arguments: Mapping[str, Any], *, tenant: str, deadline_s: float, request_id: str
    ) -> ToolResult:
        """Call a tool; see `core.tools.BuiltInTool.call`."""
        del tenant, request_id
        try:
            answer = await self._server.call(
                self._tools[name].name, arguments, deadline_s=min(deadline_s, self._timeout_s)
            )
        except DeadlineExceededError as error:
            return ToolResult("timeout", str(error))
        except ApplianceError as error:
            return ToolResult("failed", str(error))
        return ToolResult("failed" if answer.failed else "ok", answer.text)


def headers_of(wanted: McpDefinition) -> dict[str, str]:
    """Return the headers to send.

    Raises:
        InvalidRequestError: One is no header, or one that is not the client's to set. It is not quoted.
    """
    given = wanted.headers or {}
    headers = {name.lower(): value for name, value in given.items()}
    if len(given) > MOST_HEADERS or len(headers) < len(given):
        raise bad_definition(KIND, f"`headers` has more than {MOST_HEADERS} names, or one twice.")
    if wanted.authorization is not None:
        if "authorization" in headers:
            raise bad_definition(KIND, "`authorization` is given, and once more in `headers`.")
        headers["authorization"] = f"Bearer {wanted.authorization}"
    for name, value in headers.items():
        if not _HEADER.fullmatch(name) or name in _OURS or name.startswith("mcp-"):
            raise bad_definition(KIND, "`headers` has a name that is none, or not the client's to set.")
        if not value.isascii() or not value.isprintable():
            raise bad_definition(KIND, "`headers` or `authorization` has a value that is not printable ASCII.")
    return headers


def offered(wanted: McpDefinition, tools: Sequence[ServerTool]) -> dict[str, ServerTool]:
    """Return the tools that the model is offered, by the names that it has for them.

    Characters that names may not have here become `_`. A tool is left out if its name cannot be made fit, is another's,
    or its schema is none that fits.

    Raises:
        InvalidRequestError: They are too many, or one that the request names is not among them.
    """
    allowed = ToolFilter(wanted.allowed_tools) if isinstance(wanted.allowed_tools, list) else wanted.allowed_tools
    chosen: dict[str, ServerTool] = {}
    for each in tools:
        name = re.sub(r"[./: ]", "_", each.name)
        if (allowed is None or allowed.takes(each)) and _NAME.fullmatch(name) and _fits(each.schema):
            chosen.setdefault(name, each)
    named = (allowed.tool_names or []) if allowed is not None else []
    missing = next((name for name in named if name not in {each.name for each in chosen.values()}), None)
    if missing is not None:
        raise bad_definition(KIND, f"{wanted.server_label!r} has no tool {missing[:100]!r} that can be offered.")
    if len(chosen) > MOST_OFFERED:
        raise bad_definition(
            KIND, f"{wanted.server_label!r} has {len(chosen)} tools; choose at most {MOST_OFFERED} by `allowed_tools`."
        )
    return chosen


def is_guarded(approval: Literal["always", "never"] | Approval | None, tool: ServerTool) -> bool:
    """Return whether a tool needs a person's approval."""
    match approval:
        case "never":
            return False
        case Approval(always=always, never=never):
            return (always is not None and always.takes(tool)) or never is None or not never.takes(tool)
        case _:
            return True


def _fits(schema: Mapping[str, Any]) -> bool:
    """Return whether a schema is one of an object, and small enough."""
    level: list[Any] = [schema]
    for _ in range(MOST_SCHEMA_DEPTH):
        level = [inner for each in level for inner in _inner(each)]
        if not level:
            return schema.get("type") == "object" and len(msgspec.json.encode(schema)) <= MOST_SCHEMA_BYTES
    return False


def _inner(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()
