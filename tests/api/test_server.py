"""Listening, stopping and TLS."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import urllib3
from starlette.types import Receive, Scope, Send

from appliance.core.errors import SettingsError
from appliance.web.server import HttpServer
from tests.api.boxes import (
    DEADLINE_S,
    Box,
    ScriptedBox,
    Wire,
    listening,
    post,
    scripted_box,
    settings_with,
    until,
    wire,
)
from tests.api.scripted import say

pytestmark = pytest.mark.anyio

STREAM = {"model": "tiny", "prompt": "x", "stream": True}


async def never(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer nobody."""
    await asyncio.Event().wait()


async def refuses_connections(box: Box) -> bool:
    try:
        async with wire(box):
            return False
    except ConnectionError:
        return True


async def test_stopping_lets_open_requests_finish_and_accepts_no_more(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box, wire(box) as busy, wire(box) as idle:
        go = asyncio.Event()
        box.models.script = lambda _: [*say("Hello")[:1], go, *say(" again")]
        await busy.send(post("/v1/completions", STREAM))
        await busy.read_until(b'"text":"Hello"')
        box.server.stop()
        assert await idle.read_to_end() == b""
        assert await refuses_connections(box)
        go.set()
        rest = await busy.read_to_end()
        assert b'"text":" again"' in rest
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert not box.models.generations[0].cancelled.is_set()


async def test_aborting_cuts_what_is_still_open_and_cancels_its_work(tmp_path: Path) -> None:
    box: ScriptedBox
    async with scripted_box(tmp_path) as box, wire(box) as busy:
        box.models.script = lambda _: [*say("Hello")[:1], asyncio.Event()]
        await busy.send(post("/v1/completions", STREAM))
        await busy.read_until(b'"text":"Hello"')
        box.server.stop()
        box.server.abort()
        assert not (await busy.read_to_end()).endswith(b"0\r\n\r\n")
        async with asyncio.timeout(DEADLINE_S):
            await box.models.generations[0].cancelled.wait()


async def test_a_server_without_connections_stops_at_once(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box:
        box.server.stop()
        box.server.stop()


async def test_cancelling_the_server_closes_its_connections(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)

    server = HttpServer(never, settings)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(server.serve(port.set_result))
        box = Box(await port, server)
        async with wire(box) as silent:
            task.cancel()
            assert await silent.read_to_end() == b""
        assert await refuses_connections(box)


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box:
        second = HttpServer(never, settings_with(tmp_path, port=box.port))
        with pytest.raises(SettingsError, match=f"port {box.port}") as refusal:
            await second.serve(lambda _: None)
        assert refusal.value.param == "port"
        assert "--port" in refusal.value.advice
        assert (await box.ask("GET", "/health")).status == 200


async def test_an_address_that_is_not_ours_is_named(tmp_path: Path) -> None:
    server = HttpServer(never, settings_with(tmp_path, host="192.0.2.1"))
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1"):
        await server.serve(lambda _: None)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a self-signed certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, so no certificate can be made")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "server.pem", folder / "server.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=DEADLINE_S)
    return certificate, key


async def test_tls_is_served(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    async with scripted_box(tmp_path, tls_certificate=certificate[0], tls_key=certificate[1]) as box:

        def ask() -> tuple[int, bytes]:
            with urllib3.PoolManager(ca_certs=str(certificate[0]), retries=False) as pool:
                url = f"https://127.0.0.1:{box.port}/v1/completions"
                streamed = pool.request("POST", url, json=STREAM, timeout=DEADLINE_S)
                return streamed.status, streamed.data

        status, body = await anyio.to_thread.run_sync(ask)
        assert status == 200
        assert body.endswith(b"data: [DONE]\n\n")
        async with wire(box) as plain:
            await plain.send(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert not (await plain.read_to_end()).startswith(b"HTTP/1.1 200")


@asynccontextmanager
async def tls_wire(
    folder: Path, certificate: tuple[Path, Path], **changes: Any
) -> AsyncIterator[tuple[ScriptedBox, Wire]]:
    """Open a connection with TLS to a box that serves it."""
    context = ssl.create_default_context(cafile=str(certificate[0]))
    async with (
        scripted_box(folder, tls_certificate=certificate[0], tls_key=certificate[1], **changes) as box,
        wire(box, context) as client,
    ):
        yield box, client


async def test_a_slow_reader_behind_tls_still_gets_everything(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    texts = [f"{number:05d}" * 20_000 for number in range(50)]
    async with tls_wire(tmp_path, certificate) as (box, slow):
        box.models.script = lambda _: say(*texts)
        await slow.send(post("/v1/completions", STREAM, "Connection: close"))
        body = b""
        while piece := await slow.reader.read(65536):
            body += piece
            await asyncio.sleep(0)
    assert b"data: [DONE]" in body
    assert all(text.encode() in body for text in texts)


def ask_and_read_nothing(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Send a request over TLS by a socket that takes in nothing but what the kernel does."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    secure = context.wrap_socket(plain, server_hostname="127.0.0.1")
    secure.sendall(post("/v1/completions", STREAM))
    return secure


async def test_a_reader_behind_tls_that_stops_is_cut_off_and_its_work_cancelled(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    async with scripted_box(
        tmp_path, tls_certificate=certificate[0], tls_key=certificate[1], write_timeout_s=0.2
    ) as box:
        more = asyncio.Event()
        much = say(*["x" * 100_000] * 500)[:-1]  # more than the kernel takes, however large its buffers
        box.models.script = lambda _: [*much, more, *much[:20], asyncio.Event()]
        lazy = await anyio.to_thread.run_sync(ask_and_read_nothing, box.port, context)
        with lazy:
            await box.models.accepted.wait()
            await until(lambda: box.models.generations[0].delivered >= len(much))
            more.set()
            async with asyncio.timeout(DEADLINE_S):
                await box.models.generations[0].cancelled.wait()
            await until(lambda: not box.server._state.connections)


async def test_leaving_a_stream_behind_tls_cancels_its_work(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    async with tls_wire(tmp_path, certificate) as (box, leaver):
        box.models.script = lambda _: [*say("Hello")[:1], asyncio.Event()]
        await leaver.send(post("/v1/completions", STREAM))
        await leaver.read_until(b'"text":"Hello"')
        leaver.close()
        async with asyncio.timeout(DEADLINE_S):
            await box.models.generations[0].cancelled.wait()
        await until(lambda: not box.server._state.connections)


async def test_a_handshake_that_does_not_come_is_not_waited_for(
    tmp_path: Path, certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"tls_certificate": certificate[0], "tls_key": certificate[1], "header_timeout_s": 0.1}
    async with scripted_box(tmp_path, **changes) as box, wire(box) as silent:
        assert await silent.read_to_end() == b""


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_bad_tls_files_are_named(tmp_path: Path, content: str | None) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    if content is not None:
        certificate.write_text(content)
        key.write_text(content)
    with pytest.raises(SettingsError, match=r"server\.pem"):
        HttpServer(never, settings_with(tmp_path, tls_certificate=certificate, tls_key=key))


async def test_an_encrypted_key_is_refused_and_nobody_is_asked(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(certificate[1]), "-out", str(locked), "-passout", "pass:secret"]
    await anyio.run_process(command)
    settings = settings_with(tmp_path, tls_certificate=certificate[0], tls_key=locked)
    with pytest.raises(SettingsError, match=r"locked\.key"):
        HttpServer(never, settings)


async def test_the_default_tls_versions_are_modern(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    settings = settings_with(tmp_path, tls_certificate=certificate[0], tls_key=certificate[1])
    server = HttpServer(never, settings)
    assert server._tls is not None
    assert server._tls.minimum_version >= ssl.TLSVersion.TLSv1_2
    async with listening(server) as port:
        assert port > 0
