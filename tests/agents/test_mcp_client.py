"""MCP servers, good and bad, seen by the client."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from typing import Any

import pytest

from appliance.agents import mcp_client
from appliance.agents.mcp_client import McpServer
from appliance.core.errors import ApplianceError, DeadlineExceededError, UnavailableError
from tests.agents.mcp_servers import good, peer, respond, shop

pytestmark = pytest.mark.anyio

SECRET = "s3cret-token"
TOOL = {"name": "find", "inputSchema": {"type": "object"}}


def server(url: str, **headers: str) -> McpServer:
    return McpServer("shop", url, headers)


@pytest.mark.parametrize("stateless", [True, False])
@pytest.mark.parametrize("json_response", [True, False])
async def test_a_real_server_lists_its_tools_and_is_called(stateless: bool, json_response: bool) -> None:
    async with shop(stateless=stateless, json_response=json_response) as served:
        client = server(served.url, authorization=f"Bearer {SECRET}")
        tools = {each.name: each for each in await client.tools(deadline_s=60)}
        assert set(tools) == {"find_order", "orders.cancel", "fail", "hang", "flood"}
        assert tools["find_order"].schema["properties"]["number"]["type"] == "integer"
        assert tools["find_order"].annotations == {"readOnlyHint": True}
        answer = await client.call("find_order", {"number": 7}, deadline_s=60)
        assert (answer.text, answer.failed) == ("Order 7: two pumps", False)
        assert json.loads((await client.call("orders.cancel", {"number": 8}, deadline_s=60)).text) == {"cancelled": 8}
        assert served.calls == [7, ("cancel", 8)]
        assert all(each["authorization"] == f"Bearer {SECRET}" for each in served.headers)


async def test_a_tool_that_fails_or_gets_bad_arguments_says_so() -> None:
    async with shop() as served:
        failed = await server(served.url).call("fail", {}, deadline_s=60)
        assert failed.failed
        assert "closed" in failed.text or "fail" in failed.text
        assert (await server(served.url).call("find_order", {"number": "x"}, deadline_s=60)).failed


async def test_a_tool_that_hangs_is_left_at_the_deadline_and_a_flood_is_cut() -> None:
    async with shop() as served:
        with pytest.raises(DeadlineExceededError, match=r"longer than 0\.5 s"):
            await server(served.url).call("hang", {}, deadline_s=0.5)
        with pytest.raises(UnavailableError, match="says more than") as caught:
            await server(served.url).call("flood", {}, deadline_s=60)
        assert caught.value.code == "mcp_server_failed"


async def test_nothing_of_the_credentials_is_logged_even_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with shop() as served:
        client = server(served.url, authorization=f"Bearer {SECRET}", **{"x-key": SECRET})
        await client.call("find_order", {"number": 1}, deadline_s=60)
    with pytest.raises(UnavailableError) as caught:
        await client.tools(deadline_s=60)
    assert SECRET not in caplog.text
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(vars(caught.value))
    assert caught.value.__cause__ is None
    assert "Order" not in caplog.text


async def failure(does: Any, *, deadline_s: float = 60.0, call: bool = False) -> ApplianceError:
    async with peer(does) as served:
        client = server(served.url)
        visit = client.call("find", {}, deadline_s=deadline_s) if call else client.tools(deadline_s=deadline_s)
        with pytest.raises((UnavailableError, DeadlineExceededError)) as caught:
            await visit
    return caught.value


async def test_a_server_that_returns_html_is_no_mcp_server() -> None:
    async def html(message: Any, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"<html><script>alert(1)</script></html>", "text/html")

    assert "it sends text/html" in str(await failure(html))


async def test_a_server_that_says_nonsense_is_no_mcp_server() -> None:
    for body in (b"{", b"[]", b'{"jsonrpc": "2.0", "id": 99, "result": 3}', b"[" * 100_000, b"\xff\xfe"):

        async def nonsense(message: Any, writer: asyncio.StreamWriter, body: bytes = body) -> None:
            respond(writer, body)

        assert "MCP server 'shop'" in str(await failure(nonsense, deadline_s=1.0))


async def test_a_server_that_stalls_in_the_middle_of_a_stream_is_left_at_the_deadline() -> None:
    async def stall(message: Any, writer: asyncio.StreamWriter) -> None:
        if message and not good(message, writer, [TOOL]):
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\nevent: message\ndata: {"jso')
            await writer.drain()
            await asyncio.sleep(30)

    assert isinstance(await failure(stall, deadline_s=0.5, call=True), DeadlineExceededError)


async def test_a_server_that_streams_for_ever_is_cut() -> None:
    async def flood(message: Any, writer: asyncio.StreamWriter) -> None:
        if message and not good(message, writer, [TOOL]):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            while True:
                writer.write(b": nothing at all\n\n" * 4096)
                await writer.drain()

    assert "says more than" in str(await failure(flood, call=True))


async def test_a_server_that_closes_its_stream_again_and_again_is_left() -> None:
    async def close(message: Any, writer: asyncio.StreamWriter) -> None:
        if message is None or not good(message, writer, [TOOL]):
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
                b"id: 1\nretry: 0\ndata:\n\n"
            )
            await writer.drain()
            raise ConnectionError

    assert "over 64 requests" in str(await failure(close, call=True))


@pytest.mark.parametrize("length", ["10", "99999999999", "-1", "abc"])
async def test_a_server_that_lies_about_its_length_fails(length: str) -> None:
    async def lie(message: Any, writer: asyncio.StreamWriter) -> None:
        if message and not good(message, writer, [TOOL]):
            respond(writer, b'{"jsonrpc": "2.0", "id": 1, "result": {"content": []}}', content_length=length)
            await writer.drain()
            raise ConnectionError

    assert "shop" in str(await failure(lie, call=True, deadline_s=1.0))


async def test_a_server_that_redirects_elsewhere_is_not_followed() -> None:
    async def never(message: Any, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"{}")

    async with peer(never) as other:
        for status in ("301 Moved", "302 Found", "307 Temporary", "308 Permanent"):

            async def redirect(message: Any, writer: asyncio.StreamWriter, status: str = status) -> None:
                respond(writer, b"", status=status, location=other.url)

            assert "redirects elsewhere" in str(await failure(redirect))
        assert not other.calls


async def test_a_server_that_compresses_is_refused_before_anything_is_unpacked() -> None:
    async def bomb(message: Any, writer: asyncio.StreamWriter) -> None:
        respond(writer, gzip.compress(b" " * 10_000_000), content_encoding="gzip")

    assert "compresses" in str(await failure(bomb))


async def test_a_server_that_refuses_says_what_it_wants() -> None:
    async def refuse(message: Any, writer: asyncio.StreamWriter) -> None:
        respond(writer, b"{}", status="401 Unauthorized")

    assert "it answers 401" in str(await failure(refuse))


async def test_tools_without_end_are_bounded() -> None:
    async def many(message: Any, writer: asyncio.StreamWriter) -> None:
        tools = [{**TOOL, "name": f"tool_{n}"} for n in range(1000)]
        good(message or {}, writer, tools, nextCursor="more")

    assert f"over {mcp_client.MOST_LISTED} tools" in str(await failure(many))


async def test_an_endless_list_of_empty_pages_is_left() -> None:
    async def empty(message: Any, writer: asyncio.StreamWriter) -> None:
        good(message or {}, writer, [], nextCursor="more")

    assert "over 64 requests" in str(await failure(empty))


async def test_results_are_not_held_to_the_servers_own_schema() -> None:
    asked = {**TOOL, "outputSchema": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}}

    async def slow(message: Any, writer: asyncio.StreamWriter) -> None:
        if message and not good(message, writer, [asked]):
            result = {"content": [], "structuredContent": {"a": "a" * 40 + "!"}}
            respond(writer, json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}).encode())

    async with peer(slow) as served:
        assert "aaa" in (await server(served.url).call("find", {}, deadline_s=60)).text


async def test_contents_that_are_no_text_are_named() -> None:
    content = [
        {"type": "image", "data": "AAAA", "mimeType": "image/png"},
        {"type": "resource", "resource": {"uri": "a:b", "text": "inside"}},
        {"type": "resource_link", "uri": "a:b", "name": "link"},
    ]

    async def mixed(message: Any, writer: asyncio.StreamWriter) -> None:
        if message and not good(message, writer, [TOOL]):
            result = {"content": content}
            respond(writer, json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}).encode())

    async with peer(mixed) as served:
        text = (await server(served.url).call("find", {}, deadline_s=60)).text
        assert text == "[image, which cannot be shown]\ninside\n[link: a:b]"


async def test_a_server_that_is_not_there_is_said_so() -> None:
    async with peer(lambda *_: asyncio.sleep(0)) as served:
        pass
    with pytest.raises(UnavailableError, match="no connection"):
        await server(served.url).tools(deadline_s=60)
