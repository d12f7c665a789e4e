"""What a request may ask of an MCP server, and which tools of it the model is offered."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.agents.definitions import read_definition
from appliance.agents.mcp_client import ServerTool
from appliance.agents.mcp_tool import McpDefinition, McpTools, headers_of, is_guarded, offered
from appliance.core.errors import InvalidRequestError, UnavailableError
from appliance.core.tools import ToolResult
from tests.agents.mcp_servers import shop

pytestmark = pytest.mark.anyio

OBJECT = {"type": "object", "properties": {}}
READS = ServerTool("find", "Finds.", OBJECT, {"readOnlyHint": True})
WRITES = ServerTool("orders.cancel", "Cancels.", OBJECT)


def definition(**fields: Any) -> McpDefinition:
    given = {"type": "mcp", "server_label": "shop", "server_url": "http://127.0.0.1:1/mcp", **fields}
    return read_definition(given, McpDefinition)


def names(*tools: ServerTool, **fields: Any) -> list[str]:
    return list(offered(definition(**fields), tools))


def test_names_are_made_fit_and_what_cannot_be_is_left_out() -> None:
    twice = ServerTool("orders/cancel", "Another.", OBJECT)
    bad = [ServerTool(name, "", OBJECT) for name in ("", "ä", "a\nb", "x" * 65, "<|im_end|>")]
    assert names(READS, WRITES, twice, *bad) == ["find", "orders_cancel"]


def test_a_schema_that_is_none_of_an_object_or_too_large_is_left_out() -> None:
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"items": [deep]}
    for schema in ({}, {"type": "string"}, {"type": "object", "a": deep}, {"type": "object", "a": "x" * 40_000}):
        assert names(ServerTool("bad", "", schema), READS) == ["find"]


def test_the_request_chooses_tools_by_name_or_by_what_they_do() -> None:
    assert names(READS, WRITES, allowed_tools=["orders.cancel"]) == ["orders_cancel"]
    assert names(READS, WRITES, allowed_tools={"read_only": True}) == ["find"]
    assert names(READS, WRITES, allowed_tools=[]) == []
    with pytest.raises(InvalidRequestError, match="no tool 'buy'"):
        names(READS, allowed_tools=["buy"])


def test_too_many_tools_are_refused_and_a_choice_of_them_is_not() -> None:
    many = [ServerTool(f"t{n}", "", OBJECT) for n in range(500)]
    with pytest.raises(InvalidRequestError, match="500 tools"):
        names(*many)
    assert names(*many, allowed_tools=["t7"]) == ["t7"]


@pytest.mark.parametrize(
    ("approval", "guarded"),
    [
        (None, (True, True)),
        ("always", (True, True)),
        ("never", (False, False)),
        ({}, (True, True)),
        ({"never": {"tool_names": ["find"]}}, (False, True)),
        ({"never": {"read_only": True}}, (False, True)),
        ({"always": {"tool_names": ["find"]}}, (True, True)),
        ({"always": {"tool_names": ["find"]}, "never": {}}, (True, False)),
    ],
)
def test_approval_is_needed_unless_the_request_says_never(approval: Any, guarded: tuple[bool, bool]) -> None:
    wanted = definition(require_approval=approval).require_approval
    assert (is_guarded(wanted, READS), is_guarded(wanted, WRITES)) == guarded


def test_headers_are_sent_as_given_and_never_forge_others() -> None:
    assert headers_of(definition()) == {}
    assert headers_of(definition(headers={"X-Key": "a"}, authorization="t")) == {
        "x-key": "a",
        "authorization": "Bearer t",
    }
    for headers in (
        {"Host": "x"},
        {"Content-Length": "1"},
        {"Mcp-Session-Id": "x"},
        {"a b": "c"},
        {"": "c"},
        {"x": "a\r\nEvil: 1"},
        {"x": "ä"},
        {"X": "1", "x": "2"},
        {f"x{n}": "1" for n in range(33)},
    ):
        with pytest.raises(InvalidRequestError) as caught:
            headers_of(definition(headers=headers))
        assert "Evil" not in str(caught.value)
    with pytest.raises(InvalidRequestError, match="once more"):
        headers_of(definition(headers={"Authorization": "Basic secret"}, authorization="secret"))


@pytest.mark.parametrize(
    "fields",
    [
        {"server_label": "file_search"},
        {"server_label": "a b"},
        {"server_label": ""},
        {"server_url": "http://127.0.0.1:2/mcp"},
        {"server_url": "http://127.0.0.1:1/mcp/../x"},
        {"connector_id": "connector_gmail"},
        {"require_approval": "sometimes"},
        {"allowed_tools": "find"},
        {"headers": {"x": 1}},
    ],
)
async def test_a_definition_that_will_not_do_is_refused_before_anybody_is_asked(fields: dict[str, Any]) -> None:
    given = {"type": "mcp", "server_label": "shop", "server_url": "http://127.0.0.1:1/mcp", **fields}
    with pytest.raises(InvalidRequestError) as caught:
        await McpTools(["http://127.0.0.1:1/mcp"], 5.0)(given, tenant="", request_id="r")
    assert caught.value.param == "tools"


async def test_no_server_is_allowed_unless_the_operator_says_so() -> None:
    async with shop() as served:
        given = {"type": "mcp", "server_label": "shop", "server_url": served.url}
        with pytest.raises(InvalidRequestError, match="mcp_servers"):
            await McpTools([], 5.0)(given, tenant="", request_id="r")
        assert not served.headers


async def test_credentials_that_were_not_kept_are_missed() -> None:
    given = {"type": "mcp", "server_label": "s", "server_url": "http://127.0.0.1:1/mcp", "credentials_left_out": True}
    with pytest.raises(UnavailableError, match="ended with the process"):
        await McpTools(["http://127.0.0.1:1/mcp"], 5.0)(given, tenant="", request_id="r")


async def test_calls_reach_the_server_under_its_own_names_and_failures_are_typed() -> None:
    async with shop() as served:
        given = {"type": "mcp", "server_label": "shop", "server_url": served.url, "require_approval": "never"}
        tool = await McpTools([served.url], 60.0)(given, tenant="", request_id="r")
        assert tool.label == "shop"
        assert {each["name"] for each in tool.listing["tools"]} == {each.name for each in tool.tools}
        assert not tool.needs_approval("find_order")

        async def call(name: str, deadline_s: float = 60.0, **arguments: Any) -> ToolResult:
            return await tool.call(name, arguments, tenant="", deadline_s=deadline_s, request_id="r")

        assert (await call("orders_cancel", number=4)).kind == "ok"
        assert served.calls == [("cancel", 4)]
        assert (await call("fail")).kind == "failed"
        assert (await call("hang", deadline_s=0.3)).kind == "timeout"
        assert "says more than" in (await call("flood")).output
    assert (await call("find_order", number=1)).kind == "failed"
