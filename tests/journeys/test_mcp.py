"""The box as an MCP server: a real process, a real model, the official client."""

from __future__ import annotations

from pathlib import Path

import pytest
from mcp.client import Client

from tests.journeys.processes import server_process

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def test_the_official_client_asks_a_real_server(tiny_data: Path, tmp_path: Path) -> None:
    with server_process(tiny_data, tmp_path, "--model", "tiny", "--context-cells", "512") as server:
        server.wait_until_ready()
        async with Client(f"{server.url}/mcp") as client:
            models = await client.call_tool("list_models", {})
            assert "tiny" in models.content[0].text  # type: ignore[union-attr]
            answer = await client.call_tool("ask", {"question": "Hello", "max_tokens": 4})
            assert not answer.is_error
            assert answer.structured_content["model"].startswith("tiny:")
            nothing = await client.call_tool("search", {"query": "pump"})
            assert nothing.structured_content == {"passages": []}
        assert server.end() == 0
        assert "Traceback" not in server.log
