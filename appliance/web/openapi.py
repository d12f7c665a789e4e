"""The OpenAPI document, made from the table of routes and the wire types, so that it cannot drift from either.

Format: OpenAPI 3.1, whose schemas are JSON Schema 2020-12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from appliance import __version__
from appliance.web.errors import ErrorResponse, InferenceError, is_inference_path
from appliance.web.routes import Operation

REF = "#/components/schemas/{name}"

ALWAYS = (400, 403, 431, 500, 503)
"""Statuses that any request may be answered with: bad HTTP, a foreign web page, a long head, our fault, overload."""

WITH_BODY = (413, 415)
WITH_KEY = (401,)

_MEANINGS = {
    400: "The request is wrong; `param` says where.",
    401: "No API key, or one that is not valid.",
    403: "The API key lacks the scope, or the request comes from a foreign web page.",
    404: "There is no such model, file, vector store, conversation, item or response.",
    409: "It was changed meanwhile; nothing was done.",
    413: "The request body is too large.",
    415: "The request body has another media type.",
    429: "The queue is full.",
    431: "The request head is too large.",
    500: "The appliance failed; its log has the reason under the request id.",
    503: "Not ready, out of time, or too many connections.",
}

_REQUEST_ID = {
    "description": "The client's `X-Request-Id`, or a new one; the log has it too.",
    "schema": {"type": "string"},
}
_RETRY_AFTER = {"description": "Seconds until a retry may succeed.", "schema": {"type": "integer", "minimum": 1}}
_CHALLENGE = {"description": "How to authenticate.", "schema": {"type": "string"}}


@dataclass(frozen=True, slots=True)
class About:
    """What a document says of its program as a whole.

    Attributes:
        title: Of the program.
        description: Of its API.
        make_key: The command that makes an API key.
    """

    title: str
    description: str
    make_key: str


def openapi_document(
    operations: Sequence[Operation], about: About, *, keys_required: bool, limits: object = None
) -> dict[str, Any]:
    """Return the document of this server as it is set up.

    Args:
        operations: The table of routes.
        about: The program.
        keys_required: Whether requests need an API key.
        limits: Settings that appear as limits in schemas, where the wire types name any.
    """
    types = [each for operation in operations for each in _types(operation)]
    _, schemas = msgspec.json.schema_components([ErrorResponse, InferenceError, *types], ref_template=REF)
    for wire_type in types:
        _sharpen(schemas[wire_type.__name__], wire_type, limits)
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = schema["description"].partition("\n\nAttributes:")[0]
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, keys_required)
    return {
        "openapi": "3.1.0",
        "info": {"title": about.title, "version": __version__, "description": about.description},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                **{str(status): _error(status, ErrorResponse) for status in _MEANINGS},
                **{f"inference-{status}": _error(status, InferenceError) for status in _MEANINGS},
            },
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": f"`{about.make_key}` makes one."}
            },
        },
    }


def _types(operation: Operation) -> Iterable[type[msgspec.Struct]]:
    return (each for each in (*operation.request, operation.response, operation.stream) if each is not None)


def _sharpen(schema: dict[str, Any], wire_type: type[msgspec.Struct], limits: Any) -> None:
    """Say what the types alone cannot: limits that are settings, and fields of alternative types."""
    properties = schema.get("properties", {})
    if "n" in properties:
        properties["n"]["anyOf"][0]["maximum"] = limits.max_choices
    for name, (least, most) in getattr(wire_type, "schema_limits", {}).items():
        bounds = {"minimum": getattr(limits, least), "maximum": getattr(limits, most)}
        properties[name]["anyOf"][0] |= bounds
    for name, alternatives in getattr(wire_type, "schema_alternatives", {}).items():
        found, _ = msgspec.json.schema_components(alternatives, ref_template=REF)
        description = properties[name].get("description")
        properties[name] = {"anyOf": list(found), **({"description": description} if description else {})}
    conditions = getattr(wire_type, "schema_conditions", ())
    if conditions:
        schema["allOf"] = list(conditions)


def _operation(operation: Operation, keys_required: bool) -> dict[str, Any]:
    protected = operation.access is not None and keys_required
    statuses = sorted(
        {*ALWAYS, *operation.errors, *(WITH_BODY if operation.request else ()), *(WITH_KEY if protected else ())}
    )
    style = "inference-" if is_inference_path(operation.path) else ""
    document: dict[str, Any] = {
        "operationId": operation.operation_id,
        "summary": operation.summary,
        "responses": {"200": _success(operation)}
        | {str(status): {"$ref": f"#/components/responses/{style}{status}"} for status in statuses}
        | {str(status): _answer(status, wire_type) for status, wire_type in operation.other_responses.items()}
        | {str(status): _empty(meaning) for status, meaning in operation.empty_responses.items()},
    }
    if operation.access is not None:
        document["description"] = f"Needs the scope `{operation.access}` where API keys are required."
    if protected:
        document["security"] = [{"apiKey": []}]
    if operation.parameters or operation.query is not None:
        document["parameters"] = [*_path_parameters(operation), *_query_parameters(operation)]
    if operation.request:
        required = not operation.request_optional
        document["requestBody"] = {"required": required, "content": {operation.request_media_type: _request(operation)}}
    return document


def _path_parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    return (
        {"name": name, "in": "path", "required": True, "description": words, "schema": {"type": "string"}}
        for name, words in operation.parameters.items()
    )


def _query_parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    if operation.query is None:
        return
    _, schemas = msgspec.json.schema_components([operation.query], ref_template=REF)
    for name, schema in schemas[operation.query.__name__]["properties"].items():
        given = {key: value for key, value in schema.items() if key not in ("default", "description")}
        words = schema.get("description", "")
        yield {"name": name, "in": "query", "required": False, "description": words, "schema": given}


def _request(operation: Operation) -> dict[str, Any]:
    references = [_reference(each) for each in operation.request]
    return {
        "schema": references[0] if len(references) == 1 else {"anyOf": references},
        "examples": {name: {"value": value} for name, value in operation.examples.items()},
    }


def _success(operation: Operation) -> dict[str, Any]:
    untyped = {"type": "object" if operation.media_type == "application/json" else "string"}
    schema: dict[str, Any] = untyped if operation.response is None else _reference(operation.response)
    if operation.response_is_list:
        schema = {"type": "array", "items": schema}
    content: dict[str, Any] = {operation.media_type: {"schema": schema}}
    if operation.stream is not None:
        content["text/event-stream"] = {"schema": _event(operation.stream)}
    return {"description": "The answer.", "headers": {"X-Request-Id": _REQUEST_ID}, "content": content}


def _event(wire_type: type[msgspec.Struct]) -> dict[str, Any]:
    """Describe one event of a stream; that the schema stands for each event is the custom before OpenAPI 3.2."""
    chunk = {"anyOf": [_reference(wire_type), _reference(ErrorResponse)]}
    return {
        "description": "One event. Its data is a chunk, the object of an error, or `[DONE]` at the end.",
        "type": "object",
        "properties": {
            "data": {
                "anyOf": [
                    {"const": "[DONE]"},
                    {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk},
                ]
            }
        },
        "required": ["data"],
    }


def _answer(status: int, wire_type: type[msgspec.Struct]) -> dict[str, Any]:
    """Describe an answer that is no success and has a body of its own."""
    content = {"application/json": {"schema": {"anyOf": [_reference(wire_type), _reference(ErrorResponse)]}}}
    return {
        "description": f"{HTTPStatus(status).phrase}.",
        "headers": {"X-Request-Id": _REQUEST_ID},
        "content": content,
    }


def _empty(meaning: str) -> dict[str, Any]:
    """Describe an answer without a body."""
    return {"description": meaning, "headers": {"X-Request-Id": _REQUEST_ID}}


def _error(status: int, wire_type: type[msgspec.Struct]) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-Id": _REQUEST_ID}
    if status in (429, 503):
        headers["Retry-After"] = _RETRY_AFTER
    if status == 401:
        headers["WWW-Authenticate"] = _CHALLENGE
    return {
        "description": f"{HTTPStatus(status).phrase}. {_MEANINGS[status]}",
        "headers": headers,
        "content": {"application/json": {"schema": _reference(wire_type)}},
    }


def _reference(wire_type: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": REF.format(name=wire_type.__name__)}


class Document:
    """Serves the OpenAPI document, made on first use from the table of routes that it is itself in."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        """Make it with `make`."""
        self._make = make
        self._encoded = b""

    async def get(self, _: Request) -> Response:
        """Answer with the document."""
        self._encoded = self._encoded or msgspec.json.encode(self._make())
        return Response(self._encoded, media_type="application/json")
