"""MCP servers on loopback: a real one by the SDK, and peers that say what a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp_types import ToolAnnotations
from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.web.disconnect import task_group


@dataclass(slots=True)
class Served:
    """A server that runs.

    Attributes:
        headers: Those of every request that came.
        calls: What its tools were called with.
    """

    url: str = ""
    headers: list[dict[str, str]] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)


@asynccontextmanager
async def shop(*, stateless: bool = True, json_response: bool = False) -> AsyncIterator[Served]:
    """Run a real MCP server that has some tools."""
    served = Served()
    server = MCPServer("shop")

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    def find_order(number: int) -> str:
        """Find an order."""
        served.calls.append(number)
        return f"Order {number}: two pumps"

    @server.tool(name="orders.cancel")
    def cancel(number: int) -> dict[str, int]:
        """Cancel an order."""
        served.calls.append(("cancel", number))
        return {"cancelled": number}

    @server.tool()
    def fail() -> str:
        """Fail."""
        raise ValueError("the shop is closed")

    @server.tool()
    async def hang() -> str:
        """Take for ever."""
        await asyncio.Event().wait()
        return "never"

    @server.tool()
    def flood() -> str:
        """Say too much."""
        return "x" * 6_000_000

    app = server.streamable_http_app(stateless_http=stateless, json_response=json_response)
    async with running(_noting(app, served)) as port:
        served.url = f"http://127.0.0.1:{port}/mcp"
        yield served


def _noting(app: ASGIApp, served: Served) -> ASGIApp:
    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            served.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await app(scope, receive, send)

    return noted


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncIterator[int]:
    """Run an application in this loop and yield its port."""
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=1, ws="none")
    server = uvicorn.Server(config)
    server.capture_signals = _nothing  # type: ignore[method-assign, assignment]
    async with task_group() as tasks:
        tasks.create_task(server.serve())
        async with asyncio.timeout(60):
            while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
                await asyncio.sleep(0.01)
        try:
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            server.force_exit = True


class _nothing:  # noqa: N801  (stands for a function)
    def __init__(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


Peer = Callable[[dict[str, Any] | None, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def peer(does: Peer) -> AsyncIterator[Served]:
    """Run a server that answers each request as `does` says, given its JSON."""
    served = Served()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                served.calls.append(head.split("\r\n")[0])
                lengths = [
                    int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")
                ]
                body = await reader.readexactly(lengths[0]) if lengths else b""
                await does(json.loads(body) if body else None, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
    try:
        yield served
    finally:
        server.close()


def respond(
    writer: asyncio.StreamWriter, body: bytes, kind: str = "application/json", status: str = "200 OK", **more: str
) -> None:
    """Write an answer whose length is told truly, unless `more` says otherwise."""
    headers = {"content-type": kind, "content-length": str(len(body))} | {
        k.replace("_", "-"): v for k, v in more.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
    writer.write(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body)


def good(message: dict[str, Any], writer: asyncio.StreamWriter, tools: list[dict[str, Any]], **listing: Any) -> bool:
    """Do what a good legacy server does up to the list of its tools; return whether that was all."""
    results = {
        "initialize": {
            "protocolVersion": "2025-06-18",
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "peer", "version": "1"},
        },
        "tools/list": {"tools": tools, **listing},
    }
    if "id" not in message:
        respond(writer, b"", status="202 Accepted")
    elif message["method"] in results:
        respond(
            writer, json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": results[message["method"]]}).encode()
        )
    elif message["method"] == "server/discover":
        error = {"code": -32601, "message": "no such method"}
        respond(writer, json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": error}).encode())
    else:
        return False
    return True
