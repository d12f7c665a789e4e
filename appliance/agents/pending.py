"""Calls that waited for a person, and what the person decided. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.agents.loop import Call, Entry, Returned, Said
from appliance.core.sessions import Item
from appliance.core.tools import ToolResult


def decided_calls(history: Sequence[Item], new: Sequence[Item]) -> list[Entry]:
    """Return what a journal begins with where the input decides on calls of a turn before, or nothing.

    The refusals stand before the calls: whatever is kept of them, none that was refused can run.
    """
    items = (*history, *new)
    requests = {each["id"]: each for each in items if each.get("type") == "mcp_approval_request"}
    made = {each.get("approval_request_id") for each in items if each.get("type") == "mcp_call"}
    decisions = {
        each["approval_request_id"]: each
        for each in new
        if each.get("type") == "mcp_approval_response" and each["approval_request_id"] not in made
    }
    calls: list[Call] = []
    refusals: list[Entry] = []
    for name, decision in decisions.items():
        request = requests.get(name)
        if request is None:
            continue
        suffix = str(name).partition("_")[2]
        call = Call(f"call_{suffix}", request["name"], request["arguments"], f"mcp_{suffix}", approved=True)
        calls.append(call)
        if not decision["approve"]:
            reason = str(decision.get("reason") or "No reason was given.")
            refusals.append(Returned(call.id, ToolResult("refused", f"A person refused the call. {reason}")))
    return [*refusals, Said(calls=tuple(calls), by_model=False)] if calls else []
