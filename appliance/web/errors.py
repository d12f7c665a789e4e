"""The one place where an error of ours becomes an HTTP status and JSON: OpenAI's, or the Open Inference Protocol's.

The official clients retry 408, 409, 429 and 5xx by themselves, so none of these stands for the client's own fault:
a request that arrives too slowly is a 400, for instance. A 500 says nothing of our insides; the log does, under the
same request id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from appliance.core.errors import (
    ApplianceError,
    AuthenticationError,
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    SourceError,
    TooLargeError,
    UnavailableError,
)

RETRY_AFTER_S = 1.0
"""What `Retry-After` says when the error itself does not know."""

LONGEST_RETRY_AFTER_S = 3600.0


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, but not with this method."""

    default_code = "method_not_allowed"

    def __init__(self, method: str, path: str, allow: tuple[str, ...]) -> None:
        """Name the methods that the path has."""
        super().__init__(f"{path} has no method {method}.", advice=f"It has {', '.join(allow)}.")
        self.allow = allow


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one class of errors looks on the wire."""

    status: int
    type: str


KINDS: dict[type[ApplianceError], ErrorKind] = {
    InvalidRequestError: ErrorKind(400, "invalid_request_error"),
    AuthenticationError: ErrorKind(401, "authentication_error"),
    PermissionDeniedError: ErrorKind(403, "permission_error"),
    NotFoundError: ErrorKind(404, "not_found_error"),
    ConflictError: ErrorKind(409, "conflict_error"),
    TooLargeError: ErrorKind(413, "invalid_request_error"),
    OverloadedError: ErrorKind(429, "overloaded_error"),
    UnavailableError: ErrorKind(503, "unavailable_error"),
    DeadlineExceededError: ErrorKind(503, "timeout_error"),
    SourceError: ErrorKind(503, "unavailable_error"),
    ApplianceError: ErrorKind(500, "server_error"),
}
"""Kind by error class; the nearest base class counts."""

STATUS_OF_CODE = {
    "method_not_allowed": 405,
    "unsupported_media_type": 415,
    "request_head_too_large": 431,
}
"""Codes with a status of their own."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, where, and what to do about it.

    Attributes:
        message: For a person: what happened, with the figures, and what to do.
        type: The class of the error.
        param: The field of the request at fault, as `messages[0].role`, or null.
        code: A stable slug for programs.
    """

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class InferenceError(msgspec.Struct, frozen=True):
    """The body of every answer under /v2 that is not a success, as the Open Inference Protocol has it."""

    error: str


def kind_of(error: ApplianceError) -> ErrorKind:
    """Return the status and type of an error."""
    kind = next(KINDS[each] for each in type(error).__mro__ if each in KINDS)
    return ErrorKind(STATUS_OF_CODE.get(error.code, kind.status), kind.type)


def is_inference_path(path: str) -> bool:
    """Return True if answers of a path have the Open Inference Protocol's shape."""
    return path == "/v2" or path.startswith("/v2/")


def error_body(error: ApplianceError, request_id: str, path: str) -> bytes:
    """Return the JSON body for an error, in the shape that clients of the path know."""
    response = error_response(error, request_id)
    if is_inference_path(path):
        return msgspec.json.encode(InferenceError(response.error.message))
    return msgspec.json.encode(response)


def error_response(error: ApplianceError, request_id: str) -> ErrorResponse:
    """Return OpenAI's JSON for an error."""
    kind = kind_of(error)
    if kind.status == 500:
        message = f"The appliance failed to answer; its log says why under request id {request_id}."
        return ErrorResponse(ErrorDetail(message, kind.type, None, error.code))
    return ErrorResponse(ErrorDetail(str(error), kind.type, error.param, error.code))


def error_headers(error: ApplianceError) -> list[tuple[bytes, bytes]]:
    """Return the headers that go with an error: `Retry-After` in whole seconds, `Allow`, or how to authenticate."""
    status = kind_of(error).status
    if isinstance(error, MethodNotAllowedError):
        return [(b"allow", ", ".join(error.allow).encode())]
    if status in (429, 503):
        wait_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        seconds = math.ceil(min(max(wait_s, RETRY_AFTER_S), LONGEST_RETRY_AFTER_S))
        return [(b"retry-after", str(seconds).encode())]
    if status == 401:
        return [(b"www-authenticate", b'Bearer realm="appliance"')]
    return []


def internal_error() -> ApplianceError:
    """Return the error that stands for a mistake of our own."""
    return ApplianceError("An unexpected error.")
