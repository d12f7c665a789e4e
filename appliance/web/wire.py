"""From the bytes of a request body to a typed request, or to an error that shows the place. Pure.

Field declarations carry how each is treated: `ignored` ones change no answer, `refused` ones would, so only their
neutral value is accepted. The same declarations make the OpenAPI document.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from appliance.core.errors import InvalidRequestError

RequestT = TypeVar("RequestT", bound=msgspec.Struct)

Text = Annotated[str, Meta(pattern=r"^[^\x00]*$")]
"""Text without NUL, which C libraries would take for its end. Lone surrogates are no JSON text to begin with."""

_NUL_PATTERN = "matching regex '^[^\\\\x00]*$'"
_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_AT_PATH = re.compile(r" - at (?:`key` in )?`(?P<path>[^`]*)`$")
_AT_BYTE = re.compile(r"\(byte (\d+)\)")
_UNKNOWN_FIELD = re.compile(r"object contains unknown field `(?P<name>.*)`", re.DOTALL)


def meaning(words: str) -> Meta:
    """Describe a field that is acted on."""
    return Meta(description=words)


def ignored(why: str) -> Meta:
    """Declare a field that is accepted and has no effect on the answer."""
    return Meta(description=f"Accepted and ignored: {why}", extra={"treatment": "ignored"})


def refused(why: str) -> Meta:
    """Declare a field of which only the neutral value is accepted, since ignoring another would change the answer."""
    return Meta(description=f"Not supported: {why}", extra={"treatment": "refused", "why": why})


def requires(field: str, json_type: str, switch: str) -> dict[str, Any]:
    """Return JSON Schema saying that a field of a type, not null, needs another field to be true."""
    return {
        "if": {"properties": {field: {"type": json_type}}, "required": [field]},
        "then": {"properties": {switch: {"const": True}}, "required": [switch]},
    }


def decode_json(body: bytes) -> Any:
    """Decode a JSON document.

    Raises:
        InvalidRequestError: It is not JSON, or not UTF-8; the message has the line, the column and the byte.
    """
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(body, error) from error


def convert(value: Any, request_type: type[RequestT]) -> RequestT:
    """Check a decoded document against a request type.

    Raises:
        InvalidRequestError: `param` is the path of the first thing wrong, as `messages[0].role`; `code` is
            `unknown_parameter`, `unsupported_parameter` or `invalid_value`.
    """
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"The request body must be a JSON object, not {_json_type(value)}.", code="invalid_value"
        )
    try:
        return msgspec.convert(value, request_type)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), request_type) from error
    except RecursionError as error:
        raise _bad_json("is nested too deeply") from error


def convert_query(values: Mapping[str, str], request_type: type[RequestT]) -> RequestT:
    """Check the parameters of a query string, whose numbers are text, against a request type.

    Raises:
        InvalidRequestError: As by `convert`.
    """
    try:
        return msgspec.convert(values, request_type, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), request_type) from error


def decode_as(
    body: bytes | memoryview, decoder: msgspec.json.Decoder[RequestT], request_type: type[RequestT]
) -> RequestT:
    """Decode a JSON document into a request type, without a document of Python objects in between.

    Args:
        body: Of any size; what is wrong with it is found in one pass.
        decoder: Of the request type.
        request_type: As for `convert`.

    Raises:
        InvalidRequestError: As by `decode_json` and `convert`; the message has the byte where JSON ends.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), request_type) from error
    except RecursionError as error:
        raise _bad_json("is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad_json(f"is not valid JSON: {error}" if len(body) else "is empty; it must be a JSON object") from error


def refused_fields(request_type: type[msgspec.Struct]) -> Mapping[str, str]:
    """Return why each refused field of a request type is refused."""
    return {name: extra["why"] for name, extra in _treatments(request_type).items() if extra["treatment"] == "refused"}


def ignored_fields(request_type: type[msgspec.Struct]) -> frozenset[str]:
    """Return the names of the fields that have no effect."""
    return frozenset(name for name, extra in _treatments(request_type).items() if extra["treatment"] == "ignored")


@cache
def _treatments(request_type: type[msgspec.Struct]) -> dict[str, dict[str, str]]:
    hints = get_type_hints(request_type, include_extras=True)
    metas = {name: getattr(hints[name], "__metadata__", ()) for name in request_type.__struct_fields__}
    return {name: meta.extra for name, found in metas.items() for meta in found if meta.extra is not None}


def _invalid(problem: str, request_type: type[msgspec.Struct]) -> InvalidRequestError:
    """Turn msgspec's words for what is wrong into ours."""
    match = _AT_PATH.search(problem)
    path = match["path"].removeprefix("$").removeprefix(".").replace("[...]", "") if match else ""
    problem = _AT_PATH.sub("", problem)
    problem = problem[:1].lower() + problem[1:]
    field = re.split(r"[.\[]", path, maxsplit=1)[0]
    why = refused_fields(request_type).get(field)
    if why is not None:
        return InvalidRequestError(f"{field!r} is not supported: {why}", param=field, code="unsupported_parameter")
    unknown = _UNKNOWN_FIELD.fullmatch(problem)
    if unknown is not None:
        return _unknown_field(unknown["name"], path, request_type)
    explained = _explain(path, problem)
    if explained is not None:
        return explained
    if _NUL_PATTERN in problem:
        problem = "the text holds a NUL character, which no model can read"
    return InvalidRequestError(f"{path or 'The request body'}: {problem}.", param=path or None, code="invalid_value")


def _unknown_field(name: str, path: str, request_type: type[msgspec.Struct]) -> InvalidRequestError:
    full = f"{path}.{name}" if path else name
    close = get_close_matches(name, request_type.__struct_encode_fields__, n=1) if not path else []
    return InvalidRequestError(
        f"{full[:200]!r} is no parameter of this request.",
        advice=f"Did you mean {close[0]!r}?" if close else "GET /openapi.json lists the parameters.",
        param=full[:200],
        code="unknown_parameter",
    )


_EXPLANATIONS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"messages\[\d+\]\.content\[\d+\]\.type"),
        "unsupported_parameter",
        "the models here read text; parts of other types (images, audio, files) are not supported",
    ),
    (
        re.compile(r"messages\[\d+\]\.function_call"),
        "unsupported_parameter",
        "it is the older form of `tool_calls`",
    ),
    (
        re.compile(r"tools\[\d+\]\.type"),
        "unsupported_parameter",
        "the tools of chat completions are functions",
    ),
    (
        re.compile(r"tools\[\d+\]\.function\.name"),
        "invalid_value",
        "a name has at most 64 letters, digits, `_` and `-`",
    ),
    (re.compile(r"messages\[\d+\]\.audio"), "unsupported_parameter", "audio is not supported"),
    (
        re.compile(r"(items|input)\[\d+\]\.type"),
        "unsupported_parameter",
        "the items here are message, function_call, function_call_output, reasoning, file_search_call, mcp_call, "
        "mcp_list_tools, mcp_approval_request and mcp_approval_response",
    ),
    (
        re.compile(r"(items|input)\[\d+\]\.(content|output|summary)\[\d+\]\.type"),
        "unsupported_parameter",
        "the models here read text; parts of other types (images, audio, files) are not supported",
    ),
    (
        re.compile(r"inputs\[\d+\]\.datatype"),
        "invalid_value",
        "the datatypes are BOOL, UINT8 to UINT64, INT8 to INT64, FP16, BF16, FP32, FP64 and BYTES",
    ),
    (
        re.compile(r"(inputs|outputs)\[\d+\]\.parameters\.shared_memory_\w+"),
        "unsupported_parameter",
        "shared memory is not supported; send the tensor in the request",
    ),
    (
        re.compile(r"parameters\.sequence_\w+"),
        "unsupported_parameter",
        "sequences are not supported: models here keep no state from one request to the next",
    ),
    (
        re.compile(r"messages\[\d+\]\.role"),
        "invalid_value",
        "the roles are system, developer, user, assistant and tool",
    ),
)
"""Path, code and words for problems about which msgspec cannot know enough."""


def _explain(path: str, problem: str) -> InvalidRequestError | None:
    for pattern, code, words in _EXPLANATIONS:
        if pattern.fullmatch(path):
            return InvalidRequestError(f"{path}: {problem}; {words}.", param=path, code=code)
    if re.fullmatch(r"messages\[\d+\]\.content", path) and "`null`" in problem:
        words = "a message needs text, unless it is the assistant's and has tool calls"
        return InvalidRequestError(f"{path}: {problem}; {words}.", param=path, code="invalid_value")
    return None


def _number(text: str) -> float:
    """Return a whole number as int: JSON knows one kind of numbers, and some clients write 8 as 8.0."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("Number out of range")
    return int(value) if value.is_integer() and abs(value) < _EXACT else value


_EXACT = 2.0**53
"""Beyond it not every whole number has a float, so the float need not be the number that was meant."""

_DECODER = msgspec.json.Decoder(float_hook=_number)


def _not_json(body: bytes, error: Exception) -> InvalidRequestError:
    """Say where a body stops being JSON. msgspec stopped there too, but tells the place only sometimes."""
    if isinstance(error, RecursionError):
        return _bad_json("is nested too deeply")
    if not body.strip():
        return _bad_json("is empty; it must be a JSON object")
    try:
        text = body.decode()
    except UnicodeDecodeError as bad:
        return _bad_json(f"is not UTF-8: byte 0x{body[bad.start]:02x}", body[: bad.start].decode())
    return _bad_json(*_problem(text, error))


def _problem(text: str, error: Exception) -> tuple[str, str | None]:
    """Return what is wrong with a JSON text, and the part before it where that is known."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as bad:
        return f"is not valid JSON: {bad.msg}", text[: bad.pos]
    except RecursionError:
        return "is nested too deeply", None
    except ValueError as bad:  # NaN and its like, or an integer of thousands of digits
        at = _AT_BYTE.search(str(error))
        before = None if at is None else text.encode()[: int(at[1])].decode(errors="ignore")
        return f"is not valid JSON: {str(bad).partition(';')[0]}", before
    surrogate = _LONE_SURROGATE.search(text)
    if surrogate is not None:
        return f"holds half a character: {surrogate[0]} is a lone surrogate", text[: surrogate.start()]
    return f"is not valid JSON: {_AT_PATH.sub('', str(error))}", None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _bad_json(problem: str, before: str | None = None) -> InvalidRequestError:
    """Name the place behind `before`; lines and columns count from 1, bytes from 0."""
    place = ""
    if before is not None:
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        place = f", at line {line}, column {column} (byte {len(before.encode())})"
    return InvalidRequestError(f"The request body {problem}{place}.", code="invalid_json")


def _json_type(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
    }
    return names[type(value)]
