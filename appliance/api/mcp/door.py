"""`/mcp`: reads a request, and has the SDK answer it for as long as its client stays."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.api.mcp.tools import BoxTools, Caller
from appliance.core.errors import TooLargeError
from appliance.core.retrieval import VectorStores
from appliance.core.settings import Settings
from appliance.core.types import TextModels
from appliance.web.body import check_media_type, read_bytes
from appliance.web.disconnect import until_disconnected
from appliance.web.routes import Operation
from appliance.web.wire import convert, decode_json

MOST_BYTES = 4 * 1024 * 1024
"""Of a message, as the SDK reads it on the loop."""

_ACCEPT = (b"accept", b"application/json, text/event-stream")


class McpMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON-RPC message of the Model Context Protocol."""

    jsonrpc: Literal["2.0"]
    method: str
    id: str | int | UnsetType = UNSET
    params: dict[str, Any] | None = None


class McpAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON-RPC answer: a result or an error."""

    jsonrpc: Literal["2.0"]
    id: str | int | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class McpDoor:
    """Answers MCP clients. Nothing is kept between two requests."""

    def __init__(self, tools: BoxTools) -> None:
        self._tools = tools

    async def answer(self, request: Request) -> ASGIApp:
        """Read a request, and return what answers it."""
        check_media_type(request.headers)
        body = await read_bytes(request)
        if len(body) > MOST_BYTES:
            raise TooLargeError(f"The message has {len(body)} bytes; {MOST_BYTES} are allowed.")
        convert(decode_json(body), McpMessage)
        server = await asyncio.to_thread(importlib.import_module, "appliance.api.mcp.server")
        state = request.scope["state"]
        caller = Caller(state.get("tenant", ""), state.get("weight", 1.0), state["request_id"])

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            work = server.serve(self._tools, caller, _taken(scope), _once(body), send)
            await until_disconnected(receive, work, limit_s=self._tools.settings.request_timeout_s)

        return app


def _taken(scope: Scope) -> Scope:
    """Return the scope of a request that takes what we send: JSON, whatever it says."""
    headers = [each for each in scope["headers"] if each[0] != b"accept"]
    return {**scope, "headers": [*headers, _ACCEPT]}


def _once(body: bytes) -> Receive:
    """Return what gives a body that has been read, and then nothing any more."""
    left = [body]

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(), "more_body": False}

    return receive


def mcp_operations(settings: Settings, models: TextModels, stores: VectorStores) -> Sequence[Operation]:
    """Return the route of the box as an MCP server."""
    return (
        Operation(
            method="POST",
            path="/mcp",
            operation_id="mcp",
            summary="Speak the Model Context Protocol: tools that search, ask and list models",
            handler=McpDoor(BoxTools(settings, models, stores)).answer,
            access="inference",
            request=(McpMessage,),
            examples={"tools": {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}},
            response=McpAnswer,
            other_responses={400: McpAnswer, 404: McpAnswer},
            empty_responses={202: "Accepted. The message has no `id`: it is a notification, which nobody answers."},
        ),
    )
