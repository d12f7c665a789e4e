"""The box as an MCP server: `/mcp`, streamable HTTP without sessions."""
