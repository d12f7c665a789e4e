"""MCP servers over streamable HTTP, by the official SDK; its one home, which is imported when it is first needed.

A server may be anything. So all of one visit has a deadline, a number of requests and a number of bytes; compressed
answers are refused, since they unpack to any size, and so are redirects elsewhere. What a tool returns is not held to
the schema that the server gave for it: that schema is the server's as well, and its patterns may take for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import mcp_types
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from appliance.core.errors import ApplianceError, DeadlineExceededError, UnavailableError

T = TypeVar("T")

MOST_BYTES = 4 * 1024 * 1024
"""Of all answers of one visit."""
MOST_REQUESTS = 64
MOST_LISTED = 2000
_MOST_TEXT = 300

for _name in ("mcp", "httpx2", "httpcore2"):  # they log addresses, headers and what servers say; our errors tell it
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True)
class ServerTool:
    """A tool as its server describes it; nothing of it is checked but its types."""

    name: str
    description: str
    schema: Mapping[str, Any]
    annotations: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """What a tool returned, as text; `failed` is what the server says of it."""

    text: str
    failed: bool


class McpServer:
    """One server, visited anew for every question: nothing of one visit is left to the next."""

    def __init__(self, label: str, url: str, headers: Mapping[str, str]) -> None:
        self._label = label
        self._url = url
        self._headers = dict(headers)

    async def tools(self, *, deadline_s: float) -> Sequence[ServerTool]:
        """Return the server's tools.

        Raises:
            UnavailableError: It cannot be reached, is no MCP server, fails, or says too much.
            DeadlineExceededError: It takes too long.
        """
        return await self._visit(_listed, deadline_s)

    async def call(self, name: str, arguments: Mapping[str, Any], *, deadline_s: float) -> ServerAnswer:
        """Return what a tool makes of a call; raises as `tools`."""

        async def call(client: Client) -> ServerAnswer:
            request = mcp_types.CallToolRequest(
                params=mcp_types.CallToolRequestParams(name=name, arguments=dict(arguments))
            )
            result = await client.session.send_request(request, mcp_types.CallToolResult)
            return ServerAnswer(text_of(result), bool(result.is_error))

        return await self._visit(call, deadline_s)

    async def _visit(self, work: Callable[[Client], Awaitable[T]], deadline_s: float) -> T:
        """Connect, do the work, and leave."""
        bounds = _Bounds()
        done: list[T] = []
        try:
            async with (
                asyncio.timeout(deadline_s) as limit,
                httpx2.AsyncClient(
                    headers={**self._headers, "accept-encoding": "identity"},
                    timeout=deadline_s,
                    transport=_BoundedTransport(bounds),
                    trust_env=False,  # no password of a netrc file, and no proxy, that nobody asked for
                    max_redirects=2,
                ) as http,
                Client(streamable_http_client(self._url, http_client=http), cache=None) as client,
            ):
                done.append(await work(client))
        except Exception as error:  # noqa: BLE001  (the SDK raises whatever happens in it, alone and in groups)
            if done:
                return done[0]  # it only took its leave badly
            if limit.expired():
                raise self._slow(deadline_s) from None
            raise self._failed(bounds.problem or _reason(error)) from None  # whose text may quote a header
        return done[0]

    def _slow(self, deadline_s: float) -> ApplianceError:
        return DeadlineExceededError(
            f"The MCP server {self._label!r} took longer than {deadline_s:g} s.", advice="Try again later."
        )

    def _failed(self, reason: str) -> ApplianceError:
        return UnavailableError(
            f"The MCP server {self._label!r} failed: {reason}.",
            advice="Look whether it runs and what it asks for.",
            code="mcp_server_failed",
        )


def text_of(result: mcp_types.CallToolResult) -> str:
    """Return what a tool returned as text: its texts, or else its data; other contents are named."""
    parts: list[str] = []
    for block in result.content:
        if isinstance(block, mcp_types.TextContent):
            parts.append(block.text)
        elif isinstance(block, mcp_types.EmbeddedResource) and isinstance(
            block.resource, mcp_types.TextResourceContents
        ):
            parts.append(block.resource.text)
        elif isinstance(block, mcp_types.ResourceLink):
            parts.append(f"[{block.name}: {block.uri}]")
        else:
            parts.append(f"[{block.type}, which cannot be shown]")
    if not parts and result.structured_content is not None:
        return result.model_dump_json(include={"structured_content"}, by_alias=True)
    return "\n".join(parts)


async def _listed(client: Client) -> Sequence[ServerTool]:
    tools: list[ServerTool] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        tools += [
            ServerTool(
                each.name,
                each.description or "",
                each.input_schema,
                each.annotations.model_dump(by_alias=True, exclude_none=True) if each.annotations else {},
            )
            for each in page.tools
        ]
        if len(tools) > MOST_LISTED:
            raise _RefusedError(f"it has over {MOST_LISTED} tools")
        cursor = page.next_cursor
        if not cursor:
            return tools


def _reason(error: BaseException) -> str:
    """Return in words what the SDK failed with; the innermost, and nothing of the server's but its own message."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    match error:
        case _RefusedError():
            return str(error)
        case MCPError():
            return f"it answers: {error.message[:_MOST_TEXT]}"
        case httpx2.ConnectError():
            return "no connection"
        case httpx2.HTTPError():
            return "the connection broke off"
        case _:
            return "what it says is not MCP"


class _RefusedError(httpx2.TransportError):
    """A server goes beyond its bounds."""


@dataclass(slots=True)
class _Bounds:
    """What is left of a visit's bounds, and how the server went beyond them."""

    requests: int = MOST_REQUESTS
    bytes: int = MOST_BYTES
    problem: str = ""

    def refuse(self, problem: str) -> _RefusedError:
        self.problem = problem
        return _RefusedError(problem)


class _BoundedTransport(httpx2.AsyncBaseTransport):
    """Sends requests as long as the server stays within its bounds."""

    def __init__(self, bounds: _Bounds) -> None:
        self._bounds = bounds
        self._inner = httpx2.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self._bounds.requests -= 1
        if self._bounds.requests < 0:
            raise self._bounds.refuse(f"it wants over {MOST_REQUESTS} requests")
        response = await self._inner.handle_async_request(request)
        problem = _problem_of(response)
        if problem:
            self._bounds.problem = problem
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            await response.aclose()
            raise self._bounds.refuse("it compresses, though it was asked not to")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _BoundedStream(response.stream, self._bounds)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


def _problem_of(response: httpx2.Response) -> str:
    """Return what an answer's head says against it; a server may go on well after some of them."""
    status = response.status_code
    if 300 <= status < 400:
        return "it redirects elsewhere"
    if status in (401, 403):
        return f"it answers {status}, so it wants other `authorization` or `headers`"
    if status >= 400:
        return f"it answers {status}"
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if status == 200 and kind not in ("application/json", "text/event-stream"):
        return f"it sends {kind[:_MOST_TEXT] or 'nothing'}"
    return ""


class _BoundedStream(httpx2.AsyncByteStream):
    """A body that ends where the bounds end."""

    def __init__(self, inner: httpx2.AsyncByteStream, bounds: _Bounds) -> None:
        self._inner = inner
        self._bounds = bounds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            self._bounds.bytes -= len(part)
            if self._bounds.bytes < 0:
                raise self._bounds.refuse(f"it says more than {MOST_BYTES} bytes")
            yield part

    async def aclose(self) -> None:
        await self._inner.aclose()
