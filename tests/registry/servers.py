"""A file server on loopback that behaves as told, and counts what it sends."""

from __future__ import annotations

import hashlib
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


@dataclass
class FileServer:
    """Serves one file under every path, with ranges and an entity tag, until a `behaviour` does otherwise.

    Attributes:
        content: The file.
        behaviour: Called for each GET; returns True if it has answered.
        requests: Path and headers of each GET, the names in lower case.
        sent: Bytes of bodies sent, counted just before they are.
    """

    content: bytes
    behaviour: Callable[[Handler], bool] | None = None
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> Self:
        bound = type("Bound", (Handler,), {"serves": self})
        self._server = _Server(("127.0.0.1", 0), bound)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join(timeout=10)
        self._server.server_close()

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    @property
    def url(self) -> str:
        port = self._server.server_address[1]
        if isinstance(self._server.socket, ssl.SSLSocket):
            return f"https://localhost:{port}/file.gguf"
        return f"http://127.0.0.1:{port}/file.gguf"

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'

    def ranges(self) -> list[str | None]:
        return [headers.get("range") for _, headers in self.requests]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Report what is wrong with a test; a client that hangs up is what some tests are about."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    serves: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.serves.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        if self.serves.behaviour is None or not self.serves.behaviour(self):
            self.answer()

    def do_CONNECT(self) -> None:
        self.do_GET()

    def start(self) -> int:
        """Return the first byte that is asked for, or 0."""
        wanted = self.headers.get("Range", "")
        condition = self.headers.get("If-Range")
        if not wanted or condition not in (None, self.serves.etag):
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))

    def answer(self, *, until: int | None = None, headers: dict[str, str] | None = None) -> None:
        """Answer as a good server does; with `until`, break off after that byte of the file."""
        content, start = self.serves.content, self.start()
        if start >= len(content):
            self.head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            return
        head = {"ETag": self.serves.etag, "Content-Length": str(len(content) - start)}
        if start:
            head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.head(206 if start else 200, head | (headers or {}))
        self.body(content[start:until])
        if until is not None and until < len(content):
            self.close_connection = True

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, content: bytes) -> bool:
        """Send it; return False if the client has gone."""
        for place in range(0, len(content), 65_536):
            self.serves.sent += len(content[place : place + 65_536])
            try:
                self.wfile.write(content[place : place + 65_536])
            except OSError:
                self.close_connection = True
                return False
        return True

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""
