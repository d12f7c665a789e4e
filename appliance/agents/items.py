"""Output items as OpenAI has them. Pure.

A call of `file_search` is a `file_search_call`. OpenAI has no form for other tools that a box runs by itself, but one
for those of a server: so each of them is an `mcp_call` with the tool's label. A call that waits for a person is an
`mcp_approval_request`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.agents.loop import Call, parsed_arguments
from appliance.core.sessions import Item
from appliance.core.tools import ToolResult
from appliance.core.types import TokenLogprob

FILE_SEARCH = "file_search"
UNKNOWN_LABEL = "unknown"
"""The label of a call whose tool was never offered."""

KEPT_CHARACTERS = 1_000_000
"""Of a tool's result, what is kept with the response."""


SMALLEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def output_text(text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
    """Return a part of a message."""
    part: dict[str, Any] = {"type": "output_text", "annotations": [], "text": text}
    if logprobs:
        part["logprobs"] = [logprob_of(each) for each in logprobs]
    return part


def message(item: str, parts: Sequence[Mapping[str, Any]], status: str) -> Item:
    """Return a message of the assistant."""
    return {"id": item, "type": "message", "status": status, "role": "assistant", "content": list(parts)}


def function_call(call: Call, status: str) -> Item:
    """Return a call of a client's function."""
    return {
        "id": call.item,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def approval_request(call: Call, label: str) -> Item:
    """Return the request that a person agrees to a call."""
    return {
        "id": f"mcpr_{call.item.partition('_')[2]}",
        "type": "mcp_approval_request",
        "name": call.name,
        "arguments": call.arguments,
        "server_label": label,
    }


def call_item(call: Call, label: str, result: ToolResult | None) -> Item:
    """Return a call of a built-in tool, which runs as long as it has no result."""
    if label == FILE_SEARCH:
        return _file_search_call(call, result)
    item: dict[str, Any] = {
        "id": call.item,
        "type": "mcp_call",
        "name": call.name,
        "arguments": call.arguments,
        "server_label": label,
        "approval_request_id": f"mcpr_{call.item.partition('_')[2]}" if call.approved else None,
        "output": None,
        "error": None,
        "status": "calling" if result is None else "completed" if result.kind == "ok" else "failed",
    }
    if result is not None and result.kind == "ok":
        item["output"] = result.output
    elif result is not None:
        content = [{"type": "text", "text": result.output}]
        item["error"] = {"type": "mcp_tool_execution_error", "content": content, "kind": result.kind}
    return item


def _file_search_call(call: Call, result: ToolResult | None) -> Item:
    arguments = parsed_arguments(call.arguments) or {}
    query = arguments.get("query", "")
    queries = arguments.get("queries", [query] if query else [])
    item: dict[str, Any] = {
        "id": call.item,
        "type": "file_search_call",
        "status": "searching" if result is None else "completed" if result.kind == "ok" else "failed",
        "queries": [each for each in queries if isinstance(each, str)] if isinstance(queries, list) else [],
        "results": None,
    }
    if result is not None:
        item["results"] = result.details.get("results")
        item["call"] = {"name": call.name, "arguments": call.arguments, "output": result.output}
    return item


def logprob_of(logprob: TokenLogprob) -> dict[str, Any]:
    """Return a token's log probability."""
    return {
        **_token(logprob.piece, logprob.logprob),
        "top_logprobs": [_token(piece, each) for _, piece, each in logprob.top],
    }


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": piece.decode("utf-8", "replace"),
        "bytes": list(piece),
        "logprob": max(logprob, SMALLEST_LOGPROB),
    }
