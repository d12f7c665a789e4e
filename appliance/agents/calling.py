"""Runs one built-in tool: whatever it does, a result comes of it, in time and of a bounded size."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import msgspec

from appliance.agents.items import KEPT_CHARACTERS
from appliance.agents.loop import Call, parsed_arguments
from appliance.core.errors import ApplianceError
from appliance.core.tools import BuiltInTool, ToolResult

logger = logging.getLogger("appliance.agents")

DETAILS_BYTES = 1024 * 1024
"""Largest details that are kept with a result."""

_KINDS = frozenset(get_args(get_type_hints(ToolResult)["kind"]))


async def call_tool(tool: BuiltInTool, call: Call, *, tenant: str, deadline_s: float, request_id: str) -> ToolResult:
    """Return what a tool makes of a call; every failure is a result. Only a cancellation is raised."""
    arguments = parsed_arguments(call.arguments) or {}
    try:
        async with asyncio.timeout(deadline_s):
            result = await tool.call(call.name, arguments, tenant=tenant, deadline_s=deadline_s, request_id=request_id)
    except TimeoutError:
        return ToolResult("timeout", f"The tool gave no result within {deadline_s:g} s, and was stopped.")
    except ApplianceError as error:
        return ToolResult("failed", str(error))
    except Exception:
        logger.exception("The tool %r of %r failed on a mistake of its own.", call.name, tool.label)
        return ToolResult("failed", "The tool failed.")
    return checked(result)


def checked(result: Any) -> ToolResult:
    """Return a result that can be kept and shown, of whatever a tool returned."""
    if not isinstance(result, ToolResult) or result.kind not in _KINDS or not isinstance(result.output, str):
        return ToolResult("failed", "The tool gave no result that can be read.")
    output = result.output[:KEPT_CHARACTERS]
    if len(output) < len(result.output):
        output += f"\n[{len(result.output)} characters in all; the rest was not kept.]"
    output = output.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")
    return ToolResult(result.kind, output, _details(result.details))


def _details(details: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        encoded = msgspec.json.encode(details)
    except (TypeError, ValueError, RecursionError):
        return {}
    kept = msgspec.json.decode(encoded) if len(encoded) <= DETAILS_BYTES else {}
    return kept if isinstance(kept, dict) else {}
