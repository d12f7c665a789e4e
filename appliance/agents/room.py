"""The built-in tools of the box, put together."""

from __future__ import annotations

from appliance.agents.file_search import FileSearchTools, Stores
from appliance.agents.mcp_tool import McpTools
from appliance.agents.registry import ToolRegistry
from appliance.agents.sql_tool import SqlTools
from appliance.core.settings import Settings
from appliance.core.tool_settings import mcp_servers, sql_databases
from appliance.store.read_only import ReadOnlyFiles


def open_tools(settings: Settings, stores: Stores) -> ToolRegistry:
    """Return the tools that the settings allow.

    Raises:
        SettingsError: One of the settings cannot be read.
    """
    return ToolRegistry(
        {
            "file_search": FileSearchTools(stores),
            "mcp": McpTools(mcp_servers(settings), settings.mcp_timeout_s),
            "sql": SqlTools(sql_databases(settings), ReadOnlyFiles()),
        }
    )
