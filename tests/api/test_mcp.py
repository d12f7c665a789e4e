"""The box as an MCP server, asked by the official client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from jsonschema import Draft202012Validator
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from appliance.core.retrieval import NewStoreFile
from tests.api.boxes import Reply, ScriptedBox, scripted_box, until
from tests.api.scripted import say

pytestmark = pytest.mark.anyio

URL = "/mcp"
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
NOTIFICATION = {"jsonrpc": "2.0", "method": "tools/list"}
VERSION = "2026-07-28"
ENVELOPE = {"protocolVersion": VERSION, "clientCapabilities": {}}
META = {"_meta": {f"io.modelcontextprotocol/{key}": value for key, value in ENVELOPE.items()}}


@asynccontextmanager
async def client(box: ScriptedBox, mode: str = "auto", **headers: str) -> AsyncIterator[Client]:
    async with (
        httpx2.AsyncClient(headers=headers, trust_env=False) as http,
        Client(streamable_http_client(box.url + URL, http_client=http), mode=mode) as session,
    ):
        yield session


async def filled(box: ScriptedBox, text: str, tenant: str = "") -> str:
    """Put a text into a store of its own and return the store's id."""

    async def content() -> AsyncIterator[bytes]:
        yield text.encode()

    file = await box.files.create("manual.txt", "assistants", content(), tenant=tenant)
    store = box.stores.create(tenant=tenant, name="docs")
    box.stores.add(store.id, [NewStoreFile(file.id)], tenant=tenant, batch=False)
    return store.id


async def ask(box: ScriptedBox, document: Any, **headers: str) -> Reply:
    return await box.ask("POST", URL, document, headers=headers)


def test_the_sdk_costs_nothing_until_it_is_needed() -> None:
    code = "import sys, appliance.compose; print(*{'mcp', 'mcp_types', 'httpx2', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_official_client_searches_asks_and_lists(tmp_path: Path, mode: str) -> None:
    async with scripted_box(tmp_path) as box:
        store = await filled(box, "The pump starts by itself.")
        async with client(box, mode) as session:
            assert session.server_info is not None
            assert session.server_info.name == "appliance"
            tools = {each.name: each for each in (await session.list_tools()).tools}
            assert set(tools) == {"search", "ask", "list_models"}
            assert tools["search"].input_schema["required"] == ["query"]
            found = await session.call_tool("search", {"query": "pump", "vector_store_ids": [store]})
            assert not found.is_error
            assert found.structured_content["passages"][0]["text"] == "The pump starts by itself."
            assert "[1] manual.txt, page 3, Manual > Filter\n> The pump starts by itself." in found.content[0].text  # type: ignore[union-attr]
            everywhere = await session.call_tool("search", {"query": "pump", "max_num_results": 1})
            assert everywhere.structured_content == found.structured_content
            answer = await session.call_tool("ask", {"question": "Hi", "model": "tiny", "instructions": "Be short."})
            assert answer.content[0].text == "Hello, 世界!"  # type: ignore[union-attr]
            assert [each.role for each in box.models.requests[-1].prompt] == ["system", "user"]  # type: ignore[union-attr]
            models = (await session.call_tool("list_models", {})).structured_content["models"]
            assert [each["id"] for each in models] == [f"{each.name}:{each.version}" for each in box.models.cards()]


async def test_what_cannot_be_done_is_said_to_the_model_that_asked(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box, client(box) as session:
        for name, arguments, problem in (
            ("search", {}, "query"),
            ("search", {"query": "a", "surprise": 1}, "surprise"),
            ("search", {"query": "a", "vector_store_ids": ["vs_nobody"]}, "vs_nobody"),
            ("search", {"query": "a", "vector_store_ids": [f"vs_{n}" for n in range(9)]}, "9 stores"),
            ("ask", {"question": "Hi", "model": "nobody"}, "nobody"),
            ("ask", {"question": ""}, "question"),
            ("shell", {"command": "ls"}, "no tool 'shell'"),
        ):
            result = await session.session.call_tool(name, arguments)
            assert result.is_error, (name, arguments)
            assert problem in result.content[0].text  # type: ignore[union-attr]


async def test_a_mistake_of_ours_tells_nothing_of_our_insides(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box, client(box) as session:
        box.models.script = lambda _: (_ for _ in ()).throw(RuntimeError("inside"))
        result = await session.call_tool("ask", {"question": "Hi", "model": "tiny"})
        assert result.is_error
        assert "inside" not in result.model_dump_json()


async def test_the_model_is_let_go_when_the_client_leaves(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box:
        never = asyncio.Event()
        box.models.script = lambda _: [never, *say("late")]
        call = {"name": "ask", "arguments": {"question": "Hi", "model": "tiny"}}
        async with httpx2.AsyncClient(trust_env=False) as http:
            message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
            sent = asyncio.get_running_loop().create_task(http.post(box.url + URL, json=message))
            await until(lambda: bool(box.models.generations))
            sent.cancel()
            await asyncio.wait({sent})
        async with asyncio.timeout(10):
            await box.models.generations[-1].cancelled.wait()


async def test_a_key_is_asked_for_and_its_tenant_sees_its_own_stores_only(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        _, secret = box.keys.create("mine", ["inference"])
        assert (await ask(box, LIST)).status == 401
        with pytest.raises(BaseExceptionGroup) as caught:
            async with client(box):
                pass
        assert caught.group_contains(MCPError) or caught.group_contains(httpx2.HTTPStatusError)
        store = await filled(box, "A secret of somebody else.", tenant="another")
        async with client(box, authorization=f"Bearer {secret}") as session:
            result = await session.call_tool("search", {"query": "secret", "vector_store_ids": [store]})
            assert result.is_error
            assert (await session.call_tool("search", {"query": "secret"})).structured_content == {"passages": []}


async def test_foreign_web_pages_are_kept_away(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box:
        for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
            reply = await ask(box, LIST, **headers)
            assert (reply.status, reply.error["code"]) == (403, "foreign_page")


async def test_requests_that_are_none_are_refused_in_bounds(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_body_bytes=10_000) as box:
        assert (await ask(box, {**LIST, "params": {"cursor": "x" * 20_000}})).status == 413
        assert (await box.ask("POST", URL, body=b"<html>", headers={"content-type": "text/html"})).status == 415
        for body in (b"", b"{", b"[]", b'{"jsonrpc": "2.0"}', b"[" * 5000, b"\xff"):
            reply = await box.ask("POST", URL, body=body)
            assert reply.status == 400, (body, reply.body)
            assert reply.error["message"]
        assert not box.models.requests
        for method in ("GET", "DELETE"):
            assert (await box.ask(method, URL)).status == 405
        reply = await ask(box, {**LIST, "method": "tools/surprise"})
        assert reply.json()["error"]["code"] == -32601
        assert (await ask(box, {"jsonrpc": "2.0", "method": "notifications/initialized"})).status == 202


async def test_an_answer_needs_no_session_and_no_accept_header(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box:
        reply = await ask(box, LIST, accept="application/json")
        assert [each["name"] for each in reply.json()["result"]["tools"]] == ["search", "ask", "list_models"]
        assert "mcp-session-id" not in reply.headers
        assert reply.headers["content-type"].startswith("application/json")
        assert json.loads(reply.body)["id"] == 1


@pytest.mark.parametrize(
    ("message", "version", "status"),
    [
        pytest.param(LIST, "", 200, id="an answer"),
        pytest.param({**LIST, "method": "surprise"}, "", 200, id="an error"),
        pytest.param(NOTIFICATION, "", 202, id="a notification"),
        pytest.param(NOTIFICATION, VERSION, 202, id="a notification of today"),
        pytest.param(LIST, VERSION, 400, id="no envelope"),
        pytest.param({**LIST, "id": None}, "", 400, id="no message"),
        pytest.param({**LIST, "method": "surprise", "params": META}, VERSION, 404, id="no method"),
    ],
)
async def test_each_answer_is_one_that_the_document_tells_of(
    tmp_path: Path, message: dict[str, Any], version: str, status: int
) -> None:
    headers = {"mcp-protocol-version": version, "mcp-method": message["method"]} if version else {}
    async with scripted_box(tmp_path) as box:
        document = (await box.ask("GET", "/openapi.json")).json()
        reply = await ask(box, message, **headers)
    assert reply.status == status
    described = document["paths"][URL]["post"]["responses"][str(status)]
    if "$ref" in described:
        described = document["components"]["responses"][described["$ref"].rpartition("/")[2]]
    content = described.get("content")
    if content is None:
        assert reply.body == b""
    else:
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        assert list(Draft202012Validator(schema).iter_errors(reply.json())) == []
