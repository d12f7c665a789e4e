"""The door's half of MCP by the official SDK: one server a request, which ends with it. Imported on first use."""

from __future__ import annotations

import logging
from typing import Any

import mcp_types
import msgspec
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.types import Receive, Scope, Send

from appliance import __version__
from appliance.api.mcp.tools import BoxTools, Caller
from appliance.core.errors import ApplianceError

logger = logging.getLogger("appliance.api")
logging.getLogger("mcp").setLevel(logging.CRITICAL + 1)  # it logs each request and what clients say; we log by our own

INSTRUCTIONS = "An appliance with language models and documents: search its documents, ask its models."


async def serve(tools: BoxTools, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request."""
    manager = StreamableHTTPSessionManager(
        _server(tools, caller),
        json_response=True,
        stateless=True,
        max_request_body_size=tools.settings.max_body_bytes,
    )
    async with manager.run():
        await manager.handle_request(scope, receive, send)


def _server(tools: BoxTools, caller: Caller) -> Server[Any]:
    async def list_tools(_: Any, params: Any) -> mcp_types.ListToolsResult:
        del params
        return mcp_types.ListToolsResult(tools=[_described(name, kind) for name, kind in tools.kinds.items()])

    async def call_tool(_: Any, params: mcp_types.CallToolRequestParams) -> mcp_types.CallToolResult:
        try:
            outcome = await tools.call(params.name, params.arguments or {}, caller)
        except ApplianceError as error:
            return _result(str(error), failed=True)
        except Exception:
            logger.exception("A tool for an MCP client failed on a mistake of ours.")
            return _result("The appliance failed; its log says why.", failed=True)
        return _result(outcome.text, dict(outcome.data))

    return Server(
        "appliance",
        version=__version__,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _described(name: str, kind: type[msgspec.Struct]) -> mcp_types.Tool:
    (_,), schemas = msgspec.json.schema_components([kind])
    schema = {key: each for key, each in schemas[kind.__name__].items() if key not in ("title", "description")}
    return mcp_types.Tool(
        name=name,
        description=kind.__doc__,
        input_schema=schema,
        annotations=mcp_types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
    )


def _result(text: str, data: dict[str, Any] | None = None, *, failed: bool = False) -> mcp_types.CallToolResult:
    return mcp_types.CallToolResult(
        content=[mcp_types.TextContent(type="text", text=text)], structured_content=data, is_error=failed
    )
