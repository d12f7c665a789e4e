"""The HTTP client of the verbs that talk to a server: lists models and streams answers from any with OpenAI's API.

Errors of the connection and error bodies of the server become ours, so that the verb shows them as it shows its own.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import sseclient
import truststore
import urllib3
from urllib3 import exceptions

from appliance import __version__
from appliance.cli.chat_wire import (
    CachedTokens,
    Chunk,
    Message,
    Model,
    ModelList,
    ModelRuntime,
    Usage,
    decode,
    encode,
    error_in_stream,
    refusal,
    wrong_server,
)
from appliance.core.errors import InvalidRequestError, UnavailableError

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 120.0
"""The server sends a comment line every few seconds while it has nothing to say."""

LARGEST_REPLY_BYTES = 64 * 1024 * 1024
"""Of a body, and of one event in a stream."""

_READ_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one answer cost, timed here and so with the network in it.

    Attributes:
        completion_tokens: 0 if the answer was stopped before the server told.
        first_token_s: Seconds from the question to the first text, or None without any.
        seconds: From the question to the end.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Return the rate after the first token, or None if there is too little to tell."""
        if self.first_token_s is None or self.completion_tokens < 2 or self.seconds <= self.first_token_s:
            return None
        return (self.completion_tokens - 1) / (self.seconds - self.first_token_s)


class AnswerStream:
    """An answer as it comes: a context manager; iterate over it for pieces of text. Leaving it ends the answer."""

    def __init__(self, url: str, response: urllib3.BaseHTTPResponse, asked: float) -> None:
        """Take over a response that has just begun; `asked` is when the question was sent, by `perf_counter`."""
        self._url = url
        self._response = response
        self._asked = asked
        self._first: float | None = None
        self._usage = Usage()
        self.model = ""
        self.finish_reason: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection, by which the server knows that nobody listens any more."""
        self._response.close()

    def __iter__(self) -> Iterator[str]:
        """Yield text until the server says that the answer is whole.

        Raises:
            ApplianceError: The server reports an error, or the connection breaks.
        """
        with _connection_errors(self._url):
            for event in sseclient.SSEClient(_pieces(self._response)).events():
                if event.data == "[DONE]":
                    return
                chunk = decode(event.data.encode(), Chunk, self._url)
                if chunk.error is not None:
                    raise error_in_stream(chunk.error)
                self._note(chunk)
                for choice in chunk.choices:
                    if choice.delta.content:
                        self._first = self._first or time.perf_counter()
                        yield choice.delta.content
        raise UnavailableError(
            "The server ended the answer before it was whole.",
            advice="It may be stopping or out of memory; its log says more.",
        )

    def statistics(self) -> Statistics:
        """Return what the answer has cost so far."""
        details = self._usage.prompt_tokens_details or CachedTokens()
        return Statistics(
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=details.cached_tokens,
            completion_tokens=self._usage.completion_tokens,
            first_token_s=None if self._first is None else self._first - self._asked,
            seconds=time.perf_counter() - self._asked,
        )

    def _note(self, chunk: Chunk) -> None:
        self.model = chunk.model or self.model
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason


class ChatClient:
    """Talks to one server. A context manager, which closes the connections."""

    def __init__(self, url: str, *, api_key: str = "", certificate_authority: Path | None = None) -> None:
        """Nothing is sent yet.

        Args:
            url: Of the server, with or without `/v1`.
            api_key: Sent as a bearer token if not empty.
            certificate_authority: PEM file with certificates to trust besides those of the machine.

        Raises:
            InvalidRequestError: The address, the key or the file is none.
        """
        self.url = _base_url(url)
        if not (api_key.isascii() and api_key.isprintable()):
            raise InvalidRequestError("The API key has characters that no key has.", param="api_key")
        self._headers = {"User-Agent": f"appliance-chat/{__version__}", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._pool = urllib3.PoolManager(
            retries=False,
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=SILENCE_TIMEOUT_S),
            ssl_context=_tls(certificate_authority) if self.url.startswith("https:") else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.clear()

    def models(self) -> list[Model]:
        """Return what the server offers.

        Raises:
            ApplianceError: It cannot be reached, or refuses.
        """
        return decode(self.call("GET", "/models"), ModelList, self.url).data

    def tune(self, model: str, changes: Mapping[str, Any]) -> ModelRuntime:
        """Change what an appliance's loaded model runs with, and return what it then runs with.

        Args:
            model: `name` or `name:version`.
            changes: Fields of `PATCH /v1/models/{model}/runtime`; without any, nothing is changed.

        Raises:
            ApplianceError: The server cannot be reached, or refuses.
        """
        path = f"/models/{quote(model, safe='')}/runtime"
        body = self.call("PATCH", path, encode(changes)) if changes else self.call("GET", path)
        return decode(body, ModelRuntime, self.url)

    def call(
        self,
        method: str,
        path: str,
        document: bytes | Iterator[bytes] | None = None,
        *,
        media_type: str = "application/json",
        length: int | None = None,
    ) -> bytes:
        """Send a request and return the body of the answer.

        Args:
            method: Of HTTP.
            path: Behind `/v1`.
            document: The body: whole, or piece by piece.
            media_type: Of the body.
            length: Its bytes, where it comes in pieces.

        Raises:
            ApplianceError: The server cannot be reached, or refuses.
        """
        headers = self._headers if document is None else {**self._headers, "Content-Type": media_type}
        if length is not None:
            headers = {**headers, "Content-Length": str(length)}
        with _connection_errors(self.url):
            response = self._pool.request(
                method, f"{self.url}{path}", body=document, headers=headers, preload_content=False, redirect=False
            )
            with response:
                body = _read_body(response)
                if response.status != 200:
                    raise refusal(response.status, body, self.url)
        return body

    def ask(self, model: str, messages: Sequence[Message], parameters: Mapping[str, Any]) -> AnswerStream:
        """Send a conversation and return the answer as it comes.

        Args:
            model: Whom to ask.
            messages: The conversation, the question last.
            parameters: Further fields of the request, as `temperature`.

        Raises:
            ApplianceError: The server cannot be reached, or refuses.
        """
        request = {
            **parameters,
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked = time.perf_counter()
        with _connection_errors(self.url):
            response = self._pool.request(
                "POST",
                f"{self.url}/chat/completions",
                body=encode(request),
                headers={**self._headers, "Content-Type": "application/json", "Accept": "text/event-stream"},
                preload_content=False,
                redirect=False,
            )
            if response.status != 200:
                with response:
                    raise refusal(response.status, _read_body(response), self.url)
        return AnswerStream(self.url, response, asked)


def _pieces(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Yield a response's body in pieces, each as soon as it is there."""
    since_event = 0
    while piece := response.read1(_READ_BYTES):
        since_event = 0 if b"\n\n" in piece else since_event + len(piece)
        if since_event > LARGEST_REPLY_BYTES:
            raise UnavailableError(f"The server sent more than {LARGEST_REPLY_BYTES} bytes as one event.")
        yield piece


def _read_body(response: urllib3.BaseHTTPResponse) -> bytes:
    body = response.read(LARGEST_REPLY_BYTES + 1)
    if len(body) > LARGEST_REPLY_BYTES:
        raise UnavailableError(f"The server sent more than {LARGEST_REPLY_BYTES} bytes.")
    return body


@contextmanager
def _connection_errors(url: str) -> Iterator[None]:
    try:
        yield
    except exceptions.HTTPError as error:
        raise _unreachable(url, error) from error
    except UnicodeDecodeError as error:
        raise wrong_server(url, error) from error


def _unreachable(url: str, error: exceptions.HTTPError) -> UnavailableError:
    match error:
        case exceptions.NameResolutionError():
            return UnavailableError(
                f"No machine is known by the name in {url}.", advice="Check the name, or use its IP address."
            )
        case exceptions.NewConnectionError(__cause__=OSError(strerror=reason)):
            return UnavailableError(
                f"Nothing answers at {url}: {reason}.",
                advice="Start it there with `appliance serve`, or name another with --url.",
            )
        case exceptions.ConnectTimeoutError():
            return UnavailableError(
                f"{url} did not answer within {CONNECT_TIMEOUT_S:g} s.", advice="Check the address and the firewall."
            )
        case exceptions.SSLError():
            return UnavailableError(
                f"The TLS connection to {url} failed: {error}.",
                advice="If the server signed its certificate itself, name that with --ca; if it has none, use http.",
            )
        case exceptions.ReadTimeoutError():
            return UnavailableError(f"{url} said nothing for {SILENCE_TIMEOUT_S:g} s.", advice="Its log says more.")
        case _:
            return UnavailableError(
                f"The connection to {url} broke: {error}.",
                advice="Ask again; if it is a TLS server, use https in the address.",
            )


def _base_url(url: str) -> str:
    refused = InvalidRequestError(
        f"{url!r} is no address of a server.", advice="It looks like http://192.168.1.20:8080.", param="url"
    )
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise refused from error
    if not valid or parts.query or parts.fragment:
        raise refused
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}/v1"


def _tls(certificate_authority: Path | None) -> ssl.SSLContext:
    """Return a context that trusts what the machine trusts, and a file besides."""
    context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificate_authority is not None:
        try:
            context.load_verify_locations(certificate_authority)
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequestError(
                f"The certificate file {certificate_authority} cannot be read: {error}.", param="ca"
            ) from error
    return context
