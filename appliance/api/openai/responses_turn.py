"""From a checked request for a response to the turn that is carried out."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from appliance.api.openai.items import AnyItem, InputText, MessageItem, ReasoningItem, stored_items, with_types
from appliance.api.openai.responses_wire import (
    INCLUDED,
    ConversationName,
    CreateResponseRequest,
    FunctionTool,
    JsonObject,
    JsonSchema,
)
from appliance.api.openai.sampling import SMALLEST_TOP_P, check_prompt_length, priority_of, service_tier
from appliance.core.agents import Turn
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.core.structured import Grammar
from appliance.core.tools import Tool, ToolChoice
from appliance.core.types import SamplingParams
from appliance.web.wire import convert

MAX_TOOLS = 128

_ELSEWHERE = (
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
"""What `include` may ask for of items that there are none of here."""

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "mcp_approval_response": "mcpa"}

_SECRET = ("authorization", "headers")
"""Fields of a tool's definition that no answer repeats."""


def read_request(document: Any, settings: Settings, tool_types: Sequence[str]) -> CreateResponseRequest:
    """Check a request's fields, and what one says against another.

    Raises:
        InvalidRequestError: `param` says where.
    """
    fields = convert(with_types(document, "input"), CreateResponseRequest)
    _check_together(fields)
    for index, each in enumerate(fields.tools or ()):
        kind = each.get("type")
        if kind != "function" and kind not in tool_types:
            known = ", ".join(["function", *tool_types])
            raise InvalidRequestError(
                f"tools[{index}].type: {str(kind)[:100]!r} is not supported; the types here are {known}.",
                param=f"tools[{index}].type",
                code="unsupported_parameter",
            )
    if len(fields.tools or ()) > MAX_TOOLS:
        raise _bad(f"There are {len(fields.tools or ())} tools; {MAX_TOOLS} are allowed.", "tools")
    for value in fields.include or ():
        if value not in (*INCLUDED, *_ELSEWHERE):
            raise InvalidRequestError(
                f"include: {value[:100]!r} is not supported; it takes {' and '.join(INCLUDED)}.",
                param="include",
                code="unsupported_parameter",
            )
    check_prompt_length(len(fields.instructions or ""), settings, "instructions")
    return fields


def turn_of(request: Request, fields: CreateResponseRequest, settings: Settings) -> Turn:
    """Return the turn that a checked request asks for.

    Raises:
        InvalidRequestError: The input, a tool or the choice of tools will not do.
    """
    state = request.scope["state"]
    items = _items(fields.input)
    check_prompt_length(sum(len(json.dumps(each, ensure_ascii=False)) for each in items), settings, "input")
    functions, built_in = _tools(fields)
    conversation = fields.conversation
    named = conversation if isinstance(conversation, ConversationName) else ConversationName(conversation or "-")
    priority = priority_of(fields.service_tier, state)
    return Turn(
        model=fields.model,
        input=items,
        sampling=_sampling(fields),
        instructions=fields.instructions or "",
        functions=functions,
        built_in=built_in,
        tool_choice=_tool_choice(fields.tool_choice),
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        max_tool_calls=fields.max_tool_calls,
        previous=fields.previous_response_id or "",
        conversation=named.id if conversation else "",
        fork=bool(named.fork),
        store=fields.store is not False,
        stream=bool(fields.stream),
        background=bool(fields.background),
        include=tuple(fields.include or ()),
        truncation=fields.truncation or "disabled",
        tenant=state.get("tenant", ""),
        weight=state.get("weight", 1.0),
        pinned=fields.prompt_cache_retention == "24h",
        priority=priority,
        deadline_s=min(fields.timeout_s or settings.request_timeout_s, settings.request_timeout_s),
        request_id=state["request_id"],
        shown=_shown(fields, service_tier(priority)),
    )


def _items(given: str | Sequence[AnyItem] | None) -> tuple[Mapping[str, Any], ...]:
    """Return the input as items that are kept, each with an id.

    Raises:
        InvalidRequestError: Two have one id, or one holds what only OpenAI can read.
    """
    items = [MessageItem(role="user", content=[InputText(text=given)])] if isinstance(given, str) else given or ()
    for index, each in enumerate(items):
        if isinstance(each, ReasoningItem) and each.encrypted_content:
            raise InvalidRequestError(
                f"input[{index}].encrypted_content is not supported: only OpenAI can read it.",
                param=f"input[{index}].encrypted_content",
                code="unsupported_parameter",
            )
    kept = tuple(_with_id(each) for each in stored_items(items))
    ids = [each["id"] for each in kept]
    if len(set(ids)) < len(ids):
        twice = next(name for index, name in enumerate(ids) if name in ids[:index])
        raise _bad(f"Two items have the id {twice!r}.", "input")
    return kept


def _with_id(item: Mapping[str, Any]) -> Mapping[str, Any]:
    prefix = _PREFIXES.get(item["type"], "item")
    return {"id": f"{prefix}_{secrets.token_hex(12)}", **item}


def _check_together(fields: CreateResponseRequest) -> None:
    stored = fields.store is not False
    if fields.previous_response_id and fields.conversation:
        raise _bad("previous_response_id and conversation cannot both be given.", "previous_response_id")
    if fields.background and not stored:
        raise _bad("background needs `store`: what is not stored cannot be fetched.", "background")
    if fields.conversation and not stored:
        raise _bad("conversation needs `store`: without it nothing is kept.", "store")
    if fields.stream_options is not None and not fields.stream:
        raise _bad("stream_options needs `stream` to be true.", "stream_options")
    if fields.input is None and not (fields.previous_response_id or fields.conversation):
        raise _bad("input is missing.", "input")
    if fields.top_logprobs and INCLUDED[1] not in (fields.include or ()):
        raise _bad(f"top_logprobs needs {INCLUDED[1]!r} in `include`.", "top_logprobs")


def _sampling(fields: CreateResponseRequest) -> SamplingParams:
    given = {
        "temperature": fields.temperature,
        "top_p": fields.top_p if fields.top_p is None else max(fields.top_p, SMALLEST_TOP_P),
        "top_k": fields.top_k,
        "min_p": fields.min_p,
        "typical_p": fields.typical_p,
        "repeat_penalty": fields.repeat_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "presence_penalty": fields.presence_penalty,
    }
    return SamplingParams(
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        seed=fields.seed,
        max_tokens=fields.max_output_tokens,
        top_logprobs=(fields.top_logprobs or 0) if INCLUDED[1] in (fields.include or ()) else None,
        grammar=_grammar(fields),
    )


def _grammar(fields: CreateResponseRequest) -> Grammar | None:
    match fields.text.format if fields.text is not None else None:
        case JsonObject():
            return Grammar("json_object", "", "text.format")
        case JsonSchema() as wanted:
            return Grammar("json_schema", json.dumps(wanted.schema), "text.format.schema")
    return None


class _Functions(msgspec.Struct, frozen=True):
    tools: list[FunctionTool | dict[str, Any]]


def _tools(fields: CreateResponseRequest) -> tuple[tuple[Tool, ...], tuple[Mapping[str, Any], ...]]:
    """Return the client's functions, and the definitions of built-in tools."""
    functions: list[Tool] = []
    built_in: list[Mapping[str, Any]] = []
    for index, each in enumerate(fields.tools or ()):
        if each["type"] != "function":
            built_in.append(each)
            continue
        try:
            function = convert(each, FunctionTool)
        except InvalidRequestError as error:
            error.param = f"tools[{index}].{error.param}" if error.param else f"tools[{index}]"
            error.message = f"tools[{index}]: {error.message}"
            raise
        functions.append(
            Tool(function.name, function.description or "", function.parameters or {}, bool(function.strict))
        )
    return tuple(functions), tuple(built_in)


def _tool_choice(choice: Any) -> ToolChoice:
    """Return the choice of tools; one by label has `@` before it.

    Raises:
        InvalidRequestError: It has no form that OpenAI has.
    """
    match choice:
        case None:
            return ToolChoice()
        case "auto" | "required" | "none":
            return ToolChoice(choice)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [_, *_] as tools}:
            return ToolChoice(mode, tuple(_chosen(each) for each in tools))
        case _:
            return ToolChoice("required", (_chosen(choice),))


def _chosen(choice: Any) -> str:
    match choice:
        case {"type": "function", "name": str(name)} | {"type": "mcp", "name": str(name)}:
            return name
        case {"type": "mcp", "server_label": str(label)}:
            return f"@{label}"
        case {"type": str(kind)} if kind not in ("function", "mcp", "allowed_tools"):
            return f"@{kind}"
    raise _bad("tool_choice is auto, required, none, a tool by type and name, or allowed_tools.", "tool_choice")


def _shown(fields: CreateResponseRequest, tier: str) -> dict[str, Any]:
    """Return the fields of the response object that repeat the request."""
    text = msgspec.to_builtins(fields.text) if fields.text is not None else {}
    tools = [{key: each for key, each in tool.items() if key not in _SECRET} for tool in fields.tools or ()]
    return {
        "store": fields.store is not False,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "temperature": 1.0 if fields.temperature is None else fields.temperature,
        "top_p": 1.0 if fields.top_p is None else fields.top_p,
        "top_logprobs": fields.top_logprobs or 0,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": fields.tool_choice or "auto",
        "tools": tools,
        "truncation": fields.truncation or "disabled",
        "metadata": fields.metadata or {},
        "service_tier": tier,
        "reasoning": {"effort": None, "summary": None},
        "user": fields.user,
        "safety_identifier": fields.safety_identifier,
        "prompt_cache_key": fields.prompt_cache_key,
    }


def _bad(problem: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(problem, param=param, code="invalid_value")
