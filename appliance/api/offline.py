"""The door for requests without a connection: lines of batches reach the handlers that HTTP requests reach.

A line is put to the resource as a request whose body has come and whose client stays, so it is parsed, checked and
answered by the same code. What it lacks is what belongs to a connection: authentication (who created the batch was
let in, and the caller is looked up anew for each line), timeouts of its body, streams and background work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.types import Message

from appliance.api.app import encoder_operations, openai_operations
from appliance.api.openai.response_operations import response_operations
from appliance.core.agents import Agents
from appliance.core.batches import BatchEndpoint, Caller, LineAnswer
from appliance.core.encoders import TextClassifiers
from appliance.core.errors import ApplianceError, InvalidRequestError
from appliance.core.settings import Settings
from appliance.core.types import EmbeddingModels, Priority, TextModels
from appliance.observe.logs import request_id as logged_request_id
from appliance.security.keys import ApiKey
from appliance.web.auth import Authenticator
from appliance.web.errors import error_body, internal_error, kind_of
from appliance.web.routes import Handler, Operation
from appliance.web.wire import decode_json

logger = logging.getLogger("appliance.api")

_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")

_NOT_OFFLINE = {
    "stream": "a batch has nobody to stream to.",
    "background": "all lines of a batch are answered in the background.",
}
"""Fields that may not be true, and why."""


class Keys(Protocol):
    """What is asked of the key store; both calls answer in microseconds."""

    def authenticate(self, token: str) -> ApiKey | None:
        """Return the valid key with this secret, or None."""
        ...

    def find(self, key_id: str) -> ApiKey | None:
        """Return the valid key with this id, or None."""
        ...

    def has_keys(self) -> bool:
        """Tell whether any key is valid."""
        ...


class KeyHolders:
    """Who may have lines answered: whoever the door would let in now. See `core.batches.Callers`."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        """Look keys up in the key store."""
        self._keys = keys
        self._authenticator = Authenticator(settings, keys)

    def find(self, tenant: str) -> Caller | None:
        """Return who he is now, or None if he may no longer."""
        required = self._authenticator.required
        if not tenant:
            return None if required else Caller("")
        key = self._keys.find(tenant)
        if key is None or (required and not key.allows("inference")):
            return None
        return Caller(key.id, key.weight)


def offline_door(
    settings: Settings,
    *,
    text_models: TextModels,
    embedding_models: EmbeddingModels,
    classifiers: TextClassifiers,
    agents: Agents,
) -> HandlerDoor:
    """Return the door over the same parts as `create_app`."""
    return HandlerDoor(
        [
            *openai_operations(settings, text_models),
            *encoder_operations(settings, embedding_models, classifiers),
            *response_operations(settings, agents),
        ]
    )


class HandlerDoor:
    """Answers by the handlers of a table of routes. See `core.batches.OfflineDoor`."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        """Take the handlers of all endpoints that batches may name."""
        self._handlers: Mapping[str, Handler] = {
            each.path: each.handler for each in operations if each.method == "POST" and each.path in _ENDPOINTS
        }

    async def answer(self, endpoint: BatchEndpoint, body: bytes, *, caller: Caller, request_id: str) -> LineAnswer:
        """Answer one request in the lowest tier, whatever happens."""
        in_log = logged_request_id.set(request_id)
        try:
            return await self._answer(endpoint, body, caller, request_id)
        except ApplianceError as error:
            if kind_of(error).status == 500:
                logger.exception("A line of a batch failed.")
            return _refusal(error, endpoint, request_id)
        except Exception:
            logger.exception("A line of a batch failed on a mistake of ours.")
            return _refusal(internal_error(), endpoint, request_id)
        finally:
            logged_request_id.reset(in_log)

    async def _answer(self, endpoint: str, body: bytes, caller: Caller, request_id: str) -> LineAnswer:
        document = decode_json(body)
        for name, why in _NOT_OFFLINE.items():
            if isinstance(document, dict) and document.get(name):
                raise InvalidRequestError(
                    f"{name} is not supported in a batch: {why}", param=name, code="unsupported_parameter"
                )
        state: dict[str, Any] = {
            "request_id": request_id,
            "route": endpoint,
            "tenant": caller.tenant,
            "weight": caller.weight,
            "highest_tier": Priority.FLEX,
        }
        exchange = _Exchange(body)
        scope = {
            "type": "http",
            "method": "POST",
            "path": endpoint,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "path_params": {},
            "state": state,
        }
        response = await self._handlers[endpoint](Request(scope, exchange.receive))
        await response(scope, exchange.receive, exchange.send)
        return LineAnswer(exchange.status, b"".join(exchange.parts))


class _Exchange:
    """A body that has come, a client that stays, and the answer as it is collected."""

    def __init__(self, body: bytes) -> None:
        self.status = 500
        self.parts: list[bytes] = []
        self._body: bytes | None = body

    async def receive(self) -> Message:
        """Return the body, and then wait for as long as anybody asks."""
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Take a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.parts.append(message.get("body", b""))


def _refusal(error: ApplianceError, endpoint: str, request_id: str) -> LineAnswer:
    return LineAnswer(kind_of(error).status, error_body(error, request_id, endpoint), error.retry_after_s)
