"""The response object as clients see it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.agents.loop import End, Entry, Said
from appliance.core.agents import Turn
from appliance.core.errors import ApplianceError, InvalidRequestError, OverloadedError
from appliance.core.sessions import Item, ResponseStatus


def body_of(response: str, created: int, turn: Turn) -> dict[str, Any]:
    """Return the object of a response that has just begun."""
    return {
        "id": response,
        "object": "response",
        "created_at": created,
        "status": "queued" if turn.background else "in_progress",
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "model": turn.model,
        "output": [],
        "usage": None,
        "previous_response_id": turn.previous or None,
        "conversation": {"id": turn.conversation} if turn.conversation else None,
        "background": turn.background,
        "context": None,
        **turn.shown,
    }


def usage_of(journal: Sequence[Entry]) -> dict[str, Any]:
    """Return the tokens of all steps together; what was not in the cache was written to it."""
    said = [each for each in journal if isinstance(each, Said)]
    read, cached = sum(each.read_tokens for each in said), sum(each.cached_tokens for each in said)
    written = sum(each.written_tokens for each in said)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": read - cached},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


def ending_of(end: End) -> tuple[ResponseStatus, Mapping[str, Any] | None]:
    """Return the status of a response that ended so, and OpenAI's reason where it is incomplete."""
    return _ENDINGS[end.reason]


_INCOMPLETE: tuple[ResponseStatus, Mapping[str, Any]] = ("incomplete", {"reason": "max_messages"})
_ENDINGS: Mapping[str, tuple[ResponseStatus, Mapping[str, Any] | None]] = {
    "answered": ("completed", None),
    "handed_out": ("completed", None),
    "approval": ("completed", None),
    "cut": ("incomplete", {"reason": "max_output_tokens"}),
    "limit": _INCOMPLETE,
    "repeated": _INCOMPLETE,
}


def ended(
    body: Mapping[str, Any],
    status: ResponseStatus,
    output: Sequence[Item],
    usage: Mapping[str, Any] | None,
    now: int,
    **changes: Any,
) -> dict[str, Any]:
    """Return the object of a response that has ended."""
    completed = now if status == "completed" else None
    return {**body, "status": status, "output": list(output), "usage": usage, "completed_at": completed, **changes}


def error_of(error: ApplianceError, request_id: str) -> dict[str, Any]:
    """Return what a response object says of an error; nothing of our insides."""
    if isinstance(error, InvalidRequestError):
        return {"code": "invalid_prompt", "message": str(error), "param": error.param, "type": error.code}
    if isinstance(error, OverloadedError):
        return {"code": "rate_limit_exceeded", "message": str(error), "param": None, "type": error.code}
    if type(error) is ApplianceError:
        text = f"The appliance failed to answer; its log says why under request id {request_id}."
        return {"code": "server_error", "message": text, "param": None, "type": error.code}
    return {"code": "server_error", "message": str(error), "param": None, "type": error.code}
