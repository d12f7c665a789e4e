"""The table of routes: what the server routes by and the OpenAPI document is made from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.core.errors import NotFoundError
from appliance.web.auth import Authenticator
from appliance.web.errors import MethodNotAllowedError

Handler = Callable[[Request], Awaitable[ASGIApp]]
"""Answers one request whose caller was let in. Raises an ApplianceError for every answer that is not a success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        path: The template, as `/v1/models/{model}`.
        access: The scope that an API key needs, or None for a public operation.
        parameters: Meaning of each path parameter.
        query: Wire type of the query string's parameters, which all are optional.
        request: Wire types of the body; more than one are alternatives; none means no body.
        request_media_type: Of the body.
        request_optional: No body at all stands for an empty object.
        examples: Bodies that work on a box as it is set up, by name.
        response: Wire type of the answer, or None when it is not JSON of ours.
        response_is_list: The answer is a list of them.
        media_type: Of the answer.
        stream: Wire type of the chunks when the client asks for a stream.
        errors: Statuses that this operation may answer beside those that every one may.
        other_responses: Wire types of answers that are neither a success nor an error of the usual shape, by status.
        empty_responses: Meaning of the answers without a body, by status.
    """

    method: str
    path: str
    operation_id: str
    summary: str
    handler: Handler
    access: str | None
    parameters: Mapping[str, str] = field(default_factory=dict)
    query: type[msgspec.Struct] | None = None
    request: tuple[type[msgspec.Struct], ...] = ()
    request_media_type: str = "application/json"
    request_optional: bool = False
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    response: type[msgspec.Struct] | None = None
    response_is_list: bool = False
    media_type: str = "application/json"
    stream: type[msgspec.Struct] | None = None
    errors: tuple[int, ...] = ()
    other_responses: Mapping[int, type[msgspec.Struct]] = field(default_factory=dict)
    empty_responses: Mapping[int, str] = field(default_factory=dict)


class Resource:
    """All operations of one path, as an ASGI application: method, then access, then the handler."""

    def __init__(self, operations: Sequence[Operation], authenticator: Authenticator) -> None:
        self._template = operations[0].path
        self._operations = {each.method: each for each in operations}
        if "GET" in self._operations:
            self._operations["HEAD"] = self._operations["GET"]  # the server leaves the body out
        self._allow = tuple(sorted((*self._operations, "OPTIONS")))
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            MethodNotAllowedError: The path has no such method.
            AuthenticationError: No API key, or one that is not valid.
            PermissionDeniedError: The key lacks the scope.
            ApplianceError: Whatever the handler raises.
        """
        scope["state"]["route"] = self._template
        method = scope["method"]
        if method == "OPTIONS":
            await Response(status_code=204, headers={"allow": ", ".join(self._allow)})(scope, receive, send)
            return
        operation = self._operations.get(method)
        if operation is None:
            raise MethodNotAllowedError(method, self._template, self._allow)
        if operation.access is not None:
            self._authenticator.authorize(scope, operation.access)
        response = await operation.handler(Request(scope, receive))
        await response(scope, receive, send)


def starlette_routes(operations: Sequence[Operation], authenticator: Authenticator) -> list[Route]:
    """Return one Starlette route a path; operations of one path must stand together in the table."""
    paths = groupby(operations, key=lambda each: each.path)
    return [Route(path, Resource(tuple(group), authenticator)) for path, group in paths]


async def no_such_path(scope: Scope, _receive: Receive, _send: Send) -> None:
    """Refuse a path that is not in the table.

    Raises:
        NotFoundError: Always.
    """
    raise NotFoundError(f"There is no {scope['path'][:200]!r} here.", advice="GET /openapi.json lists what there is.")
