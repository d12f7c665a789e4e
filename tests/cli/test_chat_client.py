"""The chat's HTTP client against servers that misbehave, and over TLS."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cli import chat_client
from appliance.cli.chat_client import ChatClient, Statistics
from appliance.cli.chat_wire import Message
from appliance.core.errors import ApplianceError, InvalidRequestError, UnavailableError
from tests.cli.chat_server import ChatServer

QUESTION = [Message("user", "Hi")]
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer().running() as running:
        yield running


@contextlib.contextmanager
def answering(reply: bytes, *, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Answer one connection with fixed bytes, then close it; yield the server's port."""

    def answer() -> None:
        with contextlib.suppress(OSError):  # the client may leave in the middle
            connection = listener.accept()[0]
            with context.wrap_socket(connection, server_side=True) if context else connection as open_connection:
                open_connection.recv(65536)
                open_connection.sendall(reply)
                open_connection.shutdown(socket.SHUT_WR)
                while open_connection.recv(65536):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield str(listener.getsockname()[1])
        finally:
            thread.join(20)


def ask(url: str, certificate_authority: Path | None = None) -> str:
    with (
        ChatClient(url, certificate_authority=certificate_authority) as client,
        client.ask("alpha", QUESTION, {}) as stream,
    ):
        return "".join(stream)


def test_an_answer_ends_at_the_servers_word_and_not_at_the_connections_end(server: ChatServer) -> None:
    with ChatClient(server.url + "/v1/") as client, client.ask("alpha", QUESTION, {"seed": 7}) as stream:
        text = "".join(stream)
    assert text == "You said: Hi 世界👍."
    assert (stream.model, stream.finish_reason) == ("alpha", "stop")
    assert stream.statistics().completion_tokens == 3
    assert server.requests[0]["seed"] == 7


def test_leaving_an_answer_closes_the_connection(server: ChatServer) -> None:
    with (
        ChatClient(server.url) as client,
        client.ask("alpha", [Message("user", "endless")], {}) as stream,
    ):
        next(iter(stream))
    assert server.left.wait(10)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "broke"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "broke"),
        (HEAD, "before it was whole"),
        (HEAD + b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "before it was whole"),
        (HEAD + b"data: \xff\xfe\n\n", "does not speak"),
        (HEAD + b'data: {"choices": 7}\n\n', "does not speak"),
        (HEAD + b"data: " + b"a" * 3000, "one event"),
        (b"HTTP/1.1 503 No\r\nConnection: close\r\n\r\n" + b"a" * 3000, "more than 2000 bytes"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "status 302"),
    ],
    ids=["nothing", "ssh", "empty", "cut", "not utf-8", "not a chunk", "long event", "long error", "redirect"],
)
def test_a_server_that_misbehaves_is_one_error(reply: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "LARGEST_REPLY_BYTES", 2000)
    monkeypatch.setattr(chat_client, "_READ_BYTES", 512)
    with answering(reply) as port, pytest.raises(ApplianceError, match=words):
        ask(f"http://127.0.0.1:{port}")


def test_a_server_that_falls_silent_is_given_up(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "SILENCE_TIMEOUT_S", 0.3)
    with (
        ChatClient(server.url) as client,
        client.ask("alpha", [Message("user", "silent")], {}) as stream,
        pytest.raises(UnavailableError, match=r"said nothing for 0\.3 s"),
    ):
        list(stream)
    assert server.left.wait(10)


def test_a_server_that_does_not_accept_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for _ in range(3):  # fills the queue of connections that nobody accepts
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        with pytest.raises(UnavailableError, match=r"did not answer within 0\.3 s"):
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, so no certificate can be made")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return certificate, key


def test_a_certificate_that_the_server_signed_itself_is_trusted_only_if_named(certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    reply = HEAD + b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'
    with answering(reply, context=context) as port, pytest.raises(UnavailableError, match="name that with --ca"):
        ask(f"https://localhost:{port}")
    with answering(reply, context=context) as port:
        assert ask(f"https://localhost:{port}", certificate_authority=certificate[0]) == "a"


def test_a_certificate_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("no certificate")
    for path in (tmp_path / "a.pem", tmp_path / "missing.pem"):
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            ChatClient("https://localhost", certificate_authority=path)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("box", "http://box/v1"),
        ("http://box:8080/v1/", "http://box:8080/v1"),
        ("https://[::1]:8443/ai/v1", "https://[::1]:8443/ai/v1"),
    ],
)
def test_an_address_may_be_short(url: str, base: str) -> None:
    assert ChatClient(url).url == base


def test_a_rate_needs_two_tokens_and_time() -> None:
    assert Statistics(completion_tokens=3, first_token_s=1.0, seconds=2.0).tokens_per_second == 2.0
    for statistics in (
        Statistics(completion_tokens=1, first_token_s=1.0, seconds=2.0),
        Statistics(completion_tokens=3, first_token_s=2.0, seconds=2.0),
        Statistics(completion_tokens=3, seconds=2.0),
    ):
        assert statistics.tokens_per_second is None
