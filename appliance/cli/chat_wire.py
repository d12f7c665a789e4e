"""What a verb and the server it talks to say to each other, and how a server's words for a problem become ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from appliance.core.errors import (
    ApplianceError,
    AuthenticationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    TooLargeError,
    UnavailableError,
)

T = TypeVar("T")

_ERRORS: dict[int, type[ApplianceError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: TooLargeError,
    422: InvalidRequestError,
    429: OverloadedError,
    503: UnavailableError,
}
_ERRORS_IN_STREAM: dict[str, type[ApplianceError]] = {
    "invalid_request_error": InvalidRequestError,
    "overloaded_error": OverloadedError,
    "unavailable_error": UnavailableError,
    "timeout_error": UnavailableError,
}


class Message(msgspec.Struct, frozen=True):
    """One message of the conversation, as the server and a saved file have it."""

    role: str
    content: str


class Model(msgspec.Struct, frozen=True):
    """A model that the server offers."""

    id: str
    loaded: bool | None = None


class ModelList(msgspec.Struct, frozen=True):
    """Answer of `GET /v1/models`."""

    data: list[Model]


class ModelRuntime(msgspec.Struct, frozen=True):
    """Answer of `GET` and `PATCH /v1/models/{model}/runtime`."""

    model: str
    threads: int
    batch_tokens: int
    most_batch_tokens: int
    target_inter_token_latency_s: float


class CachedTokens(msgspec.Struct, frozen=True):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta
    finish_reason: str | None = None


class Problem(msgspec.Struct, frozen=True):
    """An error in OpenAI's form."""

    message: str
    type: str | None = None
    code: str | int | None = None
    param: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of an answer's stream."""

    model: str = ""
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Problem | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: Problem


def encode(request: Mapping[str, Any]) -> bytes:
    """Return a request's body.

    Raises:
        InvalidRequestError: A text has lone surrogates, as Python makes of bytes that are no UTF-8.
    """
    try:
        return msgspec.json.encode(request)
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            "The message holds bytes that are not UTF-8 text.", advice="Check the encoding of what was piped or pasted."
        ) from error


def decode(body: bytes, kind: type[T], url: str) -> T:
    """Return a body or event as the type that it must be.

    Raises:
        UnavailableError: It is none.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise wrong_server(url, error) from error


def wrong_server(url: str, error: Exception) -> UnavailableError:
    """Return the error for a server that says something else than OpenAI's API."""
    return UnavailableError(
        f"What answers at {url} does not speak OpenAI's API: {error}.", advice="Is it the address of an appliance?"
    )


def refusal(status: int, body: bytes, url: str) -> ApplianceError:
    """Return the error for an answer with a status other than 200."""
    kind = _ERRORS.get(status, ApplianceError)
    advice = "Give a key with --api-key or APPLIANCE_API_KEY." if kind is AuthenticationError else ""
    try:
        return _reported(msgspec.json.decode(body, type=_ErrorBody).error, kind, advice)
    except msgspec.DecodeError:
        return kind(f"{url} answered with status {status}.", advice=advice or "Is it the address of an appliance?")


def error_in_stream(problem: Problem) -> ApplianceError:
    """Return the error that a stream ended with."""
    return _reported(problem, _ERRORS_IN_STREAM.get(problem.type or "", ApplianceError))


def _reported(problem: Problem, kind: type[ApplianceError], advice: str = "") -> ApplianceError:
    code = None if problem.code is None else str(problem.code)
    return kind(problem.message, code=code, param=problem.param, advice=advice)
