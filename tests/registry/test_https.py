from __future__ import annotations

import hashlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.core.errors import InvalidRequestError, SourceError
from appliance.registry.blobs import Blobs, Edition, Partial
from appliance.registry.sources import https
from appliance.registry.sources.https import DeniedError, fetch
from appliance.registry.urls import check_url, shown
from tests.registry.servers import FileServer, Handler

CONTENT = bytes(range(256)) * 12_000  # 3 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


@pytest.fixture
def partial(blobs: Blobs) -> Iterator[Partial]:
    with blobs.partial(DIGEST) as opened:
        yield opened


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait milliseconds between the tries instead of seconds."""
    monkeypatch.setattr(https, "_BODIES", https._BODIES.new(backoff_factor=0.001))


def take(url: str, partial: Partial, size: int = len(CONTENT), stall_timeout_s: float = 5) -> None:
    fetch(url, partial, size, stall_timeout_s=stall_timeout_s)


def test_a_file_arrives_whole_and_its_progress_is_told(partial: Partial) -> None:
    told: list[tuple[str, int, int]] = []
    with FileServer(CONTENT) as server:
        fetch(server.url, partial, len(CONTENT), stall_timeout_s=5, progress=lambda *step: told.append(step))
    assert partial.path.read_bytes() == CONTENT
    assert told[-1] == ("downloading", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_only_the_missing_rest_is_asked_for(partial: Partial) -> None:
    partial.append(CONTENT[:HALF])
    with FileServer(CONTENT) as server:
        take(server.url, partial)
        assert server.ranges() == [f"bytes={HALF}-"]
        assert server.sent == len(CONTENT) - HALF
    assert partial.path.read_bytes() == CONTENT


def test_a_whole_file_is_not_asked_for_again(partial: Partial) -> None:
    partial.append(CONTENT)
    with FileServer(CONTENT) as server:
        take(server.url, partial)
        assert server.requests == []


def test_a_body_that_breaks_off_is_gone_on_with(partial: Partial) -> None:
    def break_off_thrice(handler: Handler) -> bool:
        if len(handler.serves.requests) <= 3:
            handler.answer(until=handler.start() + 700_000)
            return True
        return False

    with FileServer(CONTENT, break_off_thrice) as server:
        take(server.url, partial)
        assert len(server.requests) == 4
        assert server.sent <= len(CONTENT) + 3 * 65_536
    assert partial.path.read_bytes() == CONTENT


@pytest.mark.usefixtures("impatient")
def test_a_server_that_always_breaks_off_is_given_up_and_what_came_is_kept(partial: Partial) -> None:
    def always(handler: Handler) -> bool:
        handler.answer(until=max(handler.start(), 70_000))
        return True

    with FileServer(CONTENT, always) as server:
        with pytest.raises(SourceError, match="broke off"):
            take(server.url, partial)
        assert len(server.requests) <= 8
    assert partial.path.read_bytes() == CONTENT[: partial.size]
    assert partial.size >= 65_536


@pytest.mark.usefixtures("impatient")
def test_a_server_that_restarts_each_time_is_given_up(partial: Partial) -> None:
    def no_ranges(handler: Handler) -> bool:
        del handler.headers["Range"]
        handler.answer(until=HALF)
        return True

    with FileServer(CONTENT, no_ranges) as server:
        with pytest.raises(SourceError):
            take(server.url, partial)
        assert len(server.requests) <= 10


def test_a_server_without_ranges_starts_anew(partial: Partial) -> None:
    def ignore_range(handler: Handler) -> bool:
        del handler.headers["Range"]
        return False

    partial.append(b"x" * HALF)
    with FileServer(CONTENT, ignore_range) as server:
        take(server.url, partial)
    assert partial.path.read_bytes() == CONTENT


def test_a_file_that_changed_since_the_first_half_starts_anew(partial: Partial) -> None:
    partial.append(b"o" * HALF)
    with FileServer(CONTENT) as server:
        partial.edition = Edition(server.url, '"the old one"')
        take(server.url, partial)
        assert server.requests[0][1]["if-range"] == '"the old one"'
        assert partial.edition == Edition(server.url, server.etag)
    assert partial.path.read_bytes() == CONTENT


def test_an_edition_of_another_address_is_not_compared(partial: Partial) -> None:
    partial.append(CONTENT[:HALF])
    partial.edition = Edition("https://elsewhere.example/file.gguf", '"theirs"')
    with FileServer(CONTENT) as server:
        take(server.url, partial)
        assert "if-range" not in server.requests[0][1]
    assert partial.path.read_bytes() == CONTENT


def test_a_beginning_longer_than_the_server_has_starts_anew(partial: Partial) -> None:
    partial.append(b"x" * HALF)
    with FileServer(CONTENT[:HALF]) as server:
        with pytest.raises(SourceError, match=r"has a file of 1536000 bytes, not the one of 3,072,000"):
            take(server.url, partial)
        assert server.ranges() == [f"bytes={HALF}-", None]
    assert partial.size == 0


def test_a_server_with_a_larger_file_is_refused_before_its_body(partial: Partial) -> None:
    with FileServer(CONTENT + b"x") as server, pytest.raises(SourceError, match="3072001 bytes"):
        take(server.url, partial)
    assert partial.size == 0


def test_an_endless_body_is_cut_off_at_the_size_due(partial: Partial) -> None:
    def endless(handler: Handler) -> bool:
        handler.head(200, {"Connection": "close"})
        while handler.body(b"y" * 65_536):
            pass
        return True

    with FileServer(b"", endless) as server, pytest.raises(SourceError, match=r"sends more than the 3,072,000 bytes"):
        take(server.url, partial)
    assert partial.size <= len(CONTENT)


def test_a_body_that_ends_early_without_a_word_is_not_taken_for_whole(partial: Partial) -> None:
    def end_early(handler: Handler) -> bool:
        handler.head(200, {"Connection": "close"})
        handler.body(CONTENT[:100_000])
        return True

    with FileServer(CONTENT, end_early) as server:
        with pytest.raises(SourceError, match=r"ended after 100,000 of 3,072,000 bytes"):
            take(server.url, partial)
        assert len(server.requests) == 2


def test_a_wrong_range_is_refused_and_nothing_is_appended(partial: Partial) -> None:
    ranges = iter(["bytes 0-9/3072000", "bytes 1536000-3071999/9", "bytes x", ""])
    partial.append(CONTENT[:HALF])
    for value in ranges:

        def lie(handler: Handler, value: str = value) -> bool:
            handler.head(206, {"Content-Length": "10"} | ({"Content-Range": value} if value else {}))
            handler.body(b"0123456789")
            return True

        with FileServer(CONTENT, lie) as server, pytest.raises(SourceError, match=r"were due"):
            take(server.url, partial)
    assert partial.path.read_bytes() == CONTENT[:HALF]


def test_a_compressed_answer_is_refused(partial: Partial) -> None:
    def compress(handler: Handler) -> bool:
        handler.answer(headers={"Content-Encoding": "gzip"})
        return True

    with FileServer(CONTENT, compress) as server, pytest.raises(SourceError, match="compressed"):
        take(server.url, partial)
    assert partial.size == 0


def test_a_busy_server_is_asked_again(partial: Partial) -> None:
    def busy_twice(handler: Handler) -> bool:
        if len(handler.serves.requests) > 2:
            return False
        handler.head(503, {"Content-Length": "0", "Retry-After": "86400"})
        return True

    with FileServer(CONTENT, busy_twice) as server:
        take(server.url, partial)
        assert len(server.requests) == 3
    assert partial.path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "kind"), [(404, SourceError), (410, SourceError), (401, DeniedError), (403, DeniedError)]
)
def test_a_refusal_names_the_status(partial: Partial, status: int, kind: type[SourceError]) -> None:
    def refuse(handler: Handler) -> bool:
        handler.head(status, {"Content-Length": "0"})
        return True

    with FileServer(CONTENT, refuse) as server:
        with pytest.raises(kind, match=str(status)):
            take(server.url, partial)
        assert len(server.requests) == 1


def test_a_silent_server_is_given_up_after_the_time_set(partial: Partial) -> None:
    gate = threading.Event()

    def fall_silent(handler: Handler) -> bool:
        handler.head(200, {"Content-Length": str(len(CONTENT))})
        handler.body(CONTENT[:200_000])
        gate.wait(20)
        handler.close_connection = True
        return True

    with FileServer(CONTENT, fall_silent) as server:
        try:
            with pytest.raises(SourceError, match="fell silent") as refused:
                take(server.url, partial, stall_timeout_s=0.3)
        finally:
            gate.set()
        assert len(server.requests) == 1
    assert "download_timeout_s" in refused.value.advice
    assert 131_072 <= partial.size <= 200_000


def test_a_server_that_is_not_there_is_named(partial: Partial) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(SourceError, match=rf"127\.0\.0\.1:{port}/file\.gguf"):
            take(f"http://127.0.0.1:{port}/file.gguf", partial)
    assert partial.size == 0


def test_redirects_are_followed_to_where_we_may_go(partial: Partial) -> None:
    def redirect_once(handler: Handler) -> bool:
        if handler.path != "/file.gguf":
            return False
        handler.head(302, {"Location": "/moved.gguf", "Content-Length": "0"})
        return True

    with FileServer(CONTENT, redirect_once) as server:
        take(server.url, partial)
        assert [path for path, _ in server.requests] == ["/file.gguf", "/moved.gguf"]
    assert partial.path.read_bytes() == CONTENT


@pytest.mark.parametrize("location", ["http://mirror.example/f", "ftp://127.0.0.1/f", "file:///etc/passwd", "//["])
def test_redirects_elsewhere_are_refused(partial: Partial, location: str) -> None:
    def redirect(handler: Handler) -> bool:
        handler.head(302, {"Location": location, "Content-Length": "0"})
        return True

    with FileServer(CONTENT, redirect) as server, pytest.raises(SourceError, match="not followed"):
        take(server.url, partial)
    assert partial.size == 0


def test_redirects_in_a_circle_end(partial: Partial) -> None:
    def redirect(handler: Handler) -> bool:
        handler.head(302, {"Location": "/file.gguf", "Content-Length": "0"})
        return True

    with FileServer(CONTENT, redirect) as server:
        with pytest.raises(SourceError, match="more than 5 times"):
            take(server.url, partial)
        assert len(server.requests) == 6


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/f", "ftp://127.0.0.1/f", "file:///etc/passwd", "nonsense", "http://", "https://[::1"]
)
def test_other_addresses_are_refused_before_anything_is_sent(partial: Partial, url: str) -> None:
    with pytest.raises(InvalidRequestError, match="address"):
        take(url, partial)


def test_credentials_and_queries_are_not_shown() -> None:
    assert shown(check_url("https://me:secret@host/f.gguf?token=secret#secret")) == "https://host/f.gguf"


def test_credentials_in_an_address_are_sent_as_basic_authentication(partial: Partial) -> None:
    with FileServer(CONTENT) as server:
        take(server.url.replace("http://", "http://me:s%40cret@"), partial)
        assert server.requests[0][1]["authorization"] == "Basic bWU6c0BjcmV0"  # me:s@cret


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[FileServer, Path]]:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("openssl is not installed, so no certificate can be made")
    with FileServer(CONTENT) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.wrap(context)
        yield server, certificate


def test_https_trusts_what_the_system_trusts(
    partial: Partial, tls_server: tuple[FileServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, certificate = tls_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    take(server.url, partial)
    assert partial.path.read_bytes() == CONTENT


def test_https_from_a_stranger_is_refused(partial: Partial, tls_server: tuple[FileServer, Path]) -> None:
    server, _ = tls_server
    with pytest.raises(DeniedError, match="could not prove who it is"):
        take(server.url, partial)
    assert partial.size == 0


def test_https_to_http_is_not_followed(
    partial: Partial, tls_server: tuple[FileServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def redirect(handler: Handler) -> bool:
        handler.head(302, {"Location": "http://127.0.0.1:1/f", "Content-Length": "0"})
        return True

    server, certificate = tls_server
    server.behaviour = redirect
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(SourceError, match="from https to http"):
        take(server.url, partial)


def test_a_proxy_named_in_the_environment_is_used_but_not_for_loopback(
    partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_tunnel(handler: Handler) -> bool:
        handler.head(403, {"Content-Length": "0"})
        return True

    with FileServer(CONTENT) as server, FileServer(b"", refuse_tunnel) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("https_proxy", proxy.url.replace("http://", "http://me:secret@"))
        take(server.url, partial)
        assert proxy.requests == []
        partial.restart()
        with pytest.raises(SourceError):
            take("https://mirror.example/file.gguf", partial)
        assert proxy.requests[0][0] == "mirror.example:443"
        assert proxy.requests[0][1]["proxy-authorization"] == "Basic bWU6c2VjcmV0"  # me:secret
