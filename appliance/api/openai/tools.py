"""Function tools on the wire of chat completions: what is offered, what may be chosen, and calls in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from appliance.core.errors import InvalidRequestError
from appliance.core.tools import Tool, ToolCallDelta, ToolChoice
from appliance.web.wire import Text, ignored, meaning

MAX_TOOLS = 128
"""As OpenAI has it."""

FunctionName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$", max_length=64)]
CallId = Annotated[Text, Meta(min_length=1, max_length=256)]


class FunctionDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may ask for."""

    name: FunctionName
    description: Annotated[Text | None, meaning("What it does; the model reads it")] = None
    parameters: Annotated[dict[str, Any] | None, meaning("JSON Schema of its arguments; without it, it takes none")] = (
        None
    )
    strict: Annotated[bool | None, ignored("arguments satisfy the schema in either case")] = None


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one kind of tool that chat completions have here."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function by its name."""

    name: FunctionName


class NamedToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """The model must call this function."""

    function: NamedFunction


class AllowedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the functions that may be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some of the tools, and whether the model must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedFunction], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """The model may call only these."""

    allowed_tools: AllowedTools


Tools = Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)]
AnyToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was called, and with which arguments, as JSON."""

    name: FunctionName
    arguments: Text


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that the model made."""

    id: CallId
    function: CalledFunction
    type: Literal["function"] = "function"


class FunctionDelta(msgspec.Struct, frozen=True):
    """What a call gained: its name at first, with empty arguments, then these piece by piece."""

    arguments: str
    name: str | UnsetType = UNSET


class CallDelta(msgspec.Struct, frozen=True):
    """What a call of a choice gained; id and type come first, once."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


def offered_tools(tools: Sequence[FunctionTool] | None) -> tuple[Tool, ...]:
    """Return the tools that a request offers.

    Raises:
        InvalidRequestError: Two have one name.
    """
    offered: dict[str, Tool] = {}
    for index, each in enumerate(tools or ()):
        function = each.function
        if function.name in offered:
            raise InvalidRequestError(
                f"tools[{index}] has the name {function.name!r}, which a tool before it has.",
                advice="Give every tool a name of its own.",
                param=f"tools[{index}].function.name",
                code="invalid_value",
            )
        offered[function.name] = Tool(
            function.name, function.description or "", function.parameters or {}, bool(function.strict)
        )
    return tuple(offered.values())


def tool_choice(choice: AnyToolChoice | None, tools: Sequence[Tool]) -> ToolChoice:
    """Return what a request lets the model choose.

    Raises:
        InvalidRequestError: It names a tool that is not offered, or wants a call where there are no tools.
    """
    match choice:
        case NamedToolChoice(function):
            wanted = ToolChoice("required", (function.name,))
        case AllowedToolsChoice(allowed):
            names = dict.fromkeys(each.function.name for each in allowed.tools)
            wanted = ToolChoice(allowed.mode, tuple(names))
        case "auto" | "required" | "none":
            wanted = ToolChoice(choice)
        case None:
            return ToolChoice()
    known = {each.name for each in tools}
    if wanted.mode == "required" and not known:
        raise InvalidRequestError(
            "tool_choice wants a call, but the request has no tools.",
            advice="Send `tools`, or leave tool_choice out.",
            param="tool_choice",
            code="invalid_value",
        )
    for name in wanted.names:
        if name not in known:
            raise InvalidRequestError(
                f"tool_choice names {name!r}, which is not among the tools.", param="tool_choice", code="invalid_value"
            )
    return wanted


def function_calls(deltas: Sequence[ToolCallDelta]) -> list[FunctionCall]:
    """Return the whole calls of a choice, from deltas that are one a call."""
    return [FunctionCall(each.id, CalledFunction(each.name, each.arguments)) for each in deltas]


def call_deltas(deltas: Sequence[ToolCallDelta]) -> list[CallDelta]:
    """Return what goes on the wire: a call's id and name with no arguments yet, its arguments behind."""
    written = []
    for each in deltas:
        if each.id:
            first = FunctionDelta("", each.name)
            written.append(CallDelta(each.index, first, each.id, "function"))
        if each.arguments:
            written.append(CallDelta(each.index, FunctionDelta(each.arguments)))
    return written
