"""`POST /v2/models/{model}/infer`: tensors become tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio.to_thread
import numpy as np
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.api.compression import ENCODINGS, decompressed
from appliance.api.oip.request import (
    InferBody,
    deadline_of,
    header_length,
    input_tensors,
    priority_of,
    read_body,
    wanted_outputs,
)
from appliance.api.oip.response import InferAnswer, infer_answer, slow_elements
from appliance.core.errors import OverloadedError
from appliance.core.settings import Settings
from appliance.core.tensors import Tensor, TensorModels, TensorRequest
from appliance.core.types import Priority
from appliance.web.body import check_media_type, read_bytes, read_into
from appliance.web.disconnect import until_disconnected

IN_THREAD_BYTES = 100_000
"""JSON, strings and booleans of more bytes are converted in a thread: so many take about a millisecond."""

IN_THREAD_ELEMENTS = 10_000
"""Answers with more elements to write one by one are written in a thread."""

BODIES_IN_MEMORY = 4
"""So many bodies of the largest size, or more smaller ones, may be in memory at once."""

SMALL_BODY_BYTES = 1024 * 1024
"""Bodies up to this size are not counted: however slow those of others are, they find room."""

SLICE_BYTES = 1024 * 1024
"""Binary data goes out in slices of this size, so that a client has `write_timeout_s` for each."""

ALIGNMENT = 64
"""Where the binary data begins in memory: what vector instructions like, and every datatype can be read at."""


class Inference:
    """The resource."""

    def __init__(self, models: TensorModels, settings: Settings) -> None:
        self._models = models
        self._settings = settings
        self._bodies = BodyBudget(BODIES_IN_MEMORY * settings.max_tensor_body_bytes)

    async def infer(self, request: Request) -> ASGIApp:
        """Answer with the outputs; the client's leaving ends the work.

        Raises:
            ApplianceError: The request will not do, or as `TensorModels.infer`.
        """
        state, path = request.scope["state"], request.path_params
        card = self._models.card(path["model"], path.get("version", ""))
        state["model"] = f"{card.name}:{card.version}"
        with self._bodies.hold(_body_bytes(request.headers, self._settings.max_tensor_body_bytes)):
            body, inputs = await self._read(request)
            document = body.document
            wanted = wanted_outputs(document, card)
            work = TensorRequest(
                model=path["model"],
                version=path.get("version", ""),
                inputs=inputs,
                outputs=tuple(each.name for each in wanted),
                priority=max(priority_of(document), state.get("highest_tier", Priority.PRIORITY)),
                deadline_s=deadline_of(document, self._settings.request_timeout_s),
                tenant=state.get("tenant", ""),
                request_id=state["request_id"],
            )
            result = await until_disconnected(request.receive, self._models.infer(work))
            if slow_elements(result.outputs, wanted) > IN_THREAD_ELEMENTS:
                answer = await anyio.to_thread.run_sync(
                    lambda: infer_answer(result, wanted, document.id, batched=card.signature.batched)
                )
            else:
                answer = infer_answer(result, wanted, document.id, batched=card.signature.batched)
        return InferenceResponse(answer)

    async def _read(self, request: Request) -> tuple[InferBody, list[Tensor]]:
        """Read and check the request, in threads where that takes long."""
        headers = request.headers
        encoding = check_media_type(headers, "application/octet-stream", encodings=ENCODINGS)
        json_given = headers.get("inference-header-content-length")
        if encoding in ENCODINGS:
            packed, limit = await read_bytes(request), self._settings.max_tensor_body_bytes
            memory = await anyio.to_thread.run_sync(decompressed, memoryview(packed), limit)
        else:
            memory = await _uncompressed(request, json_given)
        length = header_length(json_given, len(memory))
        if length > IN_THREAD_BYTES:
            return await anyio.to_thread.run_sync(_body_and_tensors, memory, length)
        body = read_body(memory, length)
        if body.slow_bytes > IN_THREAD_BYTES:
            return body, await anyio.to_thread.run_sync(input_tensors, body)
        return body, input_tensors(body)


class BodyBudget:
    """Counts the bytes of the large bodies in memory, so that many clients together cannot use it up."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count a body while it is in memory.

        Raises:
            OverloadedError: There is no room beside the others.
        """
        if size <= SMALL_BODY_BYTES:
            size = 0
        if size and self._held and self._held + size > self._most:
            raise OverloadedError(
                f"Inference bodies of {self._held} bytes are being worked on; {size} more are over the limit of "
                f"{self._most}.",
                advice="Try again when some of them are answered.",
                retry_after_s=1.0,
            )
        self._held += size
        try:
            yield
        finally:
            self._held -= size


class InferenceResponse:
    """Sends an answer without putting its parts together."""

    def __init__(self, answer: InferAnswer) -> None:
        self._answer = answer

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the JSON, and then each tensor from its own memory."""
        answer = self._answer
        headers = [(b"content-length", b"%d" % answer.length)]
        if answer.binary:
            headers.append((b"content-type", b"application/octet-stream"))
            headers.append((b"inference-header-content-length", b"%d" % len(answer.json)))
        else:
            headers.append((b"content-type", b"application/json"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer.json, "more_body": bool(answer.binary)})
        last = len(answer.binary) - 1
        for index, tensor in enumerate(answer.binary):
            for at in range(0, max(len(tensor), 1), SLICE_BYTES):
                more = index < last or at + SLICE_BYTES < len(tensor)
                piece = tensor[at : at + SLICE_BYTES]
                await send({"type": "http.response.body", "body": piece, "more_body": more})


def _body_bytes(headers: Headers, limit: int) -> int:
    """Return how much memory a body may take; the largest where it does not say, or will expand."""
    length = headers.get("content-length", "")
    compressed = headers.get("content-encoding", "identity").lower() != "identity"
    return min(int(length), limit) if length.isdecimal() and not compressed else limit


def _body_and_tensors(memory: memoryview, length: int) -> tuple[InferBody, list[Tensor]]:
    body = read_body(memory, length)
    return body, input_tensors(body)


async def _uncompressed(request: Request, json_given: str | None) -> memoryview:
    """Read a body into memory where its binary data is aligned."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        return memoryview(await read_bytes(request))
    json_length = header_length(json_given, int(length))

    def allocate() -> memoryview:
        memory = np.empty(int(length) + ALIGNMENT, np.uint8)
        begin = -(memory.__array_interface__["data"][0] + json_length) % ALIGNMENT
        return memory.data[begin : begin + int(length)]

    return await read_into(request, allocate)
