"""A small server with OpenAI's API, which does what the question asks of it; and a terminal to run programs in."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

API_KEY = "sk-test"
MODELS = ("alpha:1", "beta:2")
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}
DEADLINE_S = 20.0


def _event(**fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode({"id": "chatcmpl-1", "object": "chat.completion.chunk", **fields}) + b"\n\n"


def _text(content: str, finish_reason: str | None = None, model: str = "alpha:1") -> bytes:
    delta = {"role": "assistant", "content": content}
    return _event(
        model=model, choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}], usage=None, unknown=1
    )


class ChatServer:
    """Counts who left in the middle of an answer, and keeps what was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.asked = threading.Event()
        self.left = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/locked/v1/models", self._locked),
                Route("/other/v1/models", self._other),
                Route("/empty/v1/models", self._empty),
            ]
        )
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[ChatServer]:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(self.app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join(DEADLINE_S)
            listener.close()

    async def _models(self, _: Request) -> Response:
        data = [{"id": name, "object": "model", "loaded": name == "beta:2"} for name in MODELS]
        return JSONResponse({"object": "list", "data": data})

    async def _locked(self, request: Request) -> Response:
        if request.headers.get("authorization") == f"Bearer {API_KEY}":
            return await self._models(request)
        problem = {"message": "No API key was given.", "type": "authentication_error", "code": "invalid_api_key"}
        return JSONResponse({"error": problem}, status_code=401)

    async def _other(self, _: Request) -> Response:
        return Response("<html>a router's login page</html>", media_type="text/html")

    async def _empty(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": []})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.asked.set()
        question = body["messages"][-1]["content"]
        if question == "busy":
            problem = {"message": "The queue is full: 64 wait.", "type": "overloaded_error", "code": "overloaded"}
            return JSONResponse({"error": problem}, status_code=429)
        if question == "proxy":
            return Response("Bad gateway", status_code=502)
        return StreamingResponse(self._answer(question, body), media_type="text/event-stream")

    async def _answer(self, question: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b": keep-alive\n\n"
        yield _text("", model=body["model"])
        if question == "endless":
            try:
                while True:
                    yield _text("again ")
                    await asyncio.sleep(0.01)
            finally:
                self.left.set()
        elif question == "silent":
            try:
                await asyncio.sleep(DEADLINE_S)
            finally:
                self.left.set()
        elif question == "fail":
            yield _text("So far ")
            yield _event(error={"message": "The engine stopped.", "type": "unavailable_error", "code": "engine_failed"})
        elif question == "break":
            yield _text("So far ")
        elif question == "nonsense":
            yield b"data: {]\n\n"
        elif question == "steer":
            yield _text("a\x1b[31mred\x9b2J\r\x07\tb\n世界")
            yield _text("", "length")
            yield b"data: [DONE]\n\n"
        else:
            encoded = _text(f"You said: {question} ") + _text("世界👍.") + _text("", "stop")
            encoded += _event(model=body["model"], choices=[], usage=USAGE) + b"data: [DONE]\n\n"
            for at in range(0, len(encoded), 7):  # pieces that split characters and events
                yield encoded[at : at + 7]


class Terminal:
    """Runs a program on a terminal of its own and types for it."""

    def __init__(self, *arguments: str, environment: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 400, 0, 0))
        take_terminal = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", take_terminal, sys.executable, "-m", "appliance", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", **environment},
        )
        os.close(slave)
        self._unread = b""

    def type(self, text: str) -> None:
        """Type and press the enter key."""
        os.write(self._master, text.encode() + b"\n")

    def press_ctrl(self, letter: str) -> None:
        """Press a key together with Ctrl, once the program waits: a signal just before that would wait with it."""
        deadline = time.monotonic() + DEADLINE_S
        while psutil.Process(self._process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline, "the program never came to rest"
        os.write(self._master, bytes([ord(letter) & 0x1F]))

    def expect(self, text: str) -> str:
        """Read on until `text` is shown; return what was shown before it."""
        wanted, deadline = text.encode(), time.monotonic() + DEADLINE_S
        while wanted not in self._unread:
            assert self._read(deadline), f"{text!r} was not shown, but {self._unread!r}"
        before, _, self._unread = self._unread.partition(wanted)
        return before.decode(errors="replace")

    def wait(self) -> int:
        """Return the exit code of a program that is about to end."""
        deadline = time.monotonic() + DEADLINE_S
        while self._read(deadline):
            pass
        return self._process.wait(max(0.0, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Read what is shown next; return False if nothing is until the deadline, or if nobody is left to show it."""
        if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            self._unread += os.read(self._master, 65536)
        except OSError:  # a terminal's way to say that nobody is left on the other side
            return False
        return True

    def leave(self) -> None:
        """End a chat that is still there; it must end well."""
        if self._process.poll() is None:
            self.type("/quit")
            assert self.wait() == 0

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@contextmanager
def terminal(*arguments: str, home: Path) -> Iterator[Terminal]:
    opened = Terminal(*arguments, environment={"HOME": str(home), "XDG_CONFIG_HOME": str(home)})
    try:
        yield opened
    finally:
        opened.close()
