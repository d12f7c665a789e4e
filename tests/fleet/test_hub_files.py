"""Files of releases from the hub by HTTPS range: for enrolled boxes only, over links that break, never believed."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from urllib3.exceptions import HTTPError

from appliance.core.clock import SystemClock
from appliance.core.errors import SettingsError, SourceError
from appliance.core.fleet import PIECE_BYTES, Job
from appliance.core.hub_settings import load_hub_settings
from appliance.core.releases import JOB_TYPE
from appliance.fleet.sources import MirrorSource, fetch
from appliance.hub.authority import Authority
from appliance.hub.director import director_keys
from appliance.hub.init import load_authority
from appliance.messaging.options import TlsFiles
from appliance.registry.install import import_model
from appliance.registry.sources.https import get
from appliance.security.certificates import CLAIM_NAME
from appliance.security.envelopes import open_envelope
from appliance.security.signing import PublicKey
from tests.fleet.broker import Peer, free_port
from tests.fleet.links import KeptLink
from tests.fleet.made_hub import MadeHub, made_hub, options_of
from tests.fleet.test_hub_source import CONTENT, PIECES, Target
from tests.fleet.test_key_rotation import begin
from tests.fleet.updating import MODEL, Releases, UpdatingBox, sealed, tiny_model
from tests.hub.hubs import until

pytestmark = pytest.mark.anyio

NAME = f"sha256-{PIECES.digest}"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    opened = Target(tmp_path / "device")
    yield opened
    opened.database.close()


@asynccontextmanager
async def offering(folder: Path, content: bytes = CONTENT) -> AsyncIterator[tuple[MadeHub, TlsFiles]]:
    """Run a hub that has a file, and enrol a box; yield both."""
    port = free_port()
    async with made_hub(folder / "hub", files_port=port) as made:
        blobs = made.settings.data_dir / "blobs"
        blobs.mkdir(exist_ok=True)
        (blobs / NAME).write_bytes(content)
        tls = options_of(await made.enrol(folder / "box", "box-1")).tls
        assert tls is not None
        yield made, tls


def url(made: MadeHub, port: int = 0) -> str:
    return f"https://localhost:{port or made.settings.files_port}"


async def ask(address: str, tls: TlsFiles, range_header: str = "bytes=0-9") -> tuple[int, bytes]:
    def send() -> tuple[int, bytes]:
        with get(address, {"Range": range_header}, 20.0, tls.context()) as response:
            return response.status, response.read()

    return await asyncio.to_thread(send)


class CuttingRelay:
    """Breaks each connection once it has passed on so many bytes to the client."""

    def __init__(self, port: int, after: int) -> None:
        self.connections = 0
        self._port = port
        self._after = after

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            with contextlib.suppress(OSError):
                async with asyncio.TaskGroup() as tasks:
                    up = tasks.create_task(self._pass(reader, far_writer, 2**60))
                    await self._pass(far_reader, writer, self._after)
                    up.cancel()
        finally:
            for each in (writer, far_writer):
                each.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int) -> None:
        with contextlib.suppress(OSError):
            while most > 0 and (data := await reader.read(min(most, 65_536))):
                writer.write(data)
                await writer.drain()
                most -= len(data)


async def test_a_file_comes_over_a_link_that_breaks_and_goes_on_where_it_was(tmp_path: Path, target: Target) -> None:
    async with offering(tmp_path) as (made, tls):
        relay = CuttingRelay(made.settings.files_port, 5 * PIECE_BYTES // 2)
        async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
            source = MirrorSource(url(made, server.sockets[0].getsockname()[1]), context=tls.context)
            with target.open() as download:
                async with asyncio.timeout(60):
                    await fetch(download, [source])
        assert relay.connections == 3, "two of them were cut after two pieces each"
    assert target.is_right()


async def test_a_box_installs_a_release_that_comes_from_the_hub_by_https_alone(tmp_path: Path) -> None:
    async with offering(tmp_path) as (made, tls):
        releases = Releases(made.settings.data_dir / "blobs")
        content = tiny_model(tmp_path / "new.gguf", embedding=192)
        job = msgspec.structs.replace(releases.add(content), files=url(made))
        with closing(UpdatingBox(tmp_path / "data", KeptLink(), releases, context=tls.context)) as box:
            tiny_model(tmp_path / "old.gguf", seed=0)
            import_model(tmp_path / "old.gguf", box.registry, name=MODEL, version="1")
            assert await box.updates.take(sealed(job))
            report = await box.until("confirmed", "failed", "rejected")
            assert (report.state, report.code) == ("confirmed", "")
            assert box.registry.resolve(f"{MODEL}:2").files[0].path.read_bytes() == content


async def test_a_connection_that_is_never_of_use_is_left(tmp_path: Path, target: Target) -> None:
    async with offering(tmp_path) as (made, tls):
        relay = CuttingRelay(made.settings.files_port, PIECE_BYTES // 2)
        async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
            source = MirrorSource(url(made, server.sockets[0].getsockname()[1]), context=tls.context)
            with target.open() as download:
                with pytest.raises(SourceError):
                    await asyncio.wait_for(fetch(download, [source]), 60)
                assert download.percent == 0
        assert relay.connections == 2


async def test_a_hub_that_has_other_bytes_is_not_believed(tmp_path: Path, target: Target) -> None:
    async with offering(tmp_path, bytes(len(CONTENT))) as (made, tls):
        with target.open() as download, pytest.raises(SourceError) as refusal:
            await fetch(download, [MirrorSource(url(made), context=tls.context)])
        assert refusal.value.code == "source_lied"
    with target.open() as download:
        assert download.percent == 0


async def test_only_files_of_releases_are_there_and_ranges_are_as_asked_for(tmp_path: Path) -> None:
    async with offering(tmp_path) as (made, tls):
        base = url(made)
        assert await ask(f"{base}/{NAME}", tls, "bytes=5-9") == (206, CONTENT[5:10])
        assert (await ask(f"{base}/{NAME}", tls, f"bytes={len(CONTENT)}-"))[0] == 416
        secret = made.settings.data_dir / "blobs" / "secret"
        secret.write_bytes(b"secret")
        (made.settings.data_dir / "blobs" / f"sha256-{'a' * 64}").symlink_to(made.settings.database_path)
        for name in (
            f"sha256-{'0' * 64}",
            "secret",
            "..%2Fhub.db",
            NAME.upper(),
            "",
            f"{NAME}/x",
            f"sha256-{'a' * 64}",
        ):
            assert (await ask(f"{base}/{name}", tls))[0] == 404, name


async def test_nobody_but_an_enrolled_box_is_let_in_and_a_revoked_one_not_any_more(tmp_path: Path) -> None:
    async with offering(tmp_path) as (made, tls):
        address = f"{url(made)}/{NAME}"
        stranger = ssl.create_default_context(cafile=str(tls.authority))
        with pytest.raises(HTTPError):
            await ask(address, _Bare(stranger))  # type: ignore[arg-type]
        claim = load_authority(made.settings).client(CLAIM_NAME, time.time())
        (tmp_path / "claim.pem").write_bytes(claim.key + claim.certificate)
        assert (await ask(address, replace(tls, certificate=tmp_path / "claim.pem", key=tmp_path / "claim.pem")))[
            0
        ] == 403
        assert (await ask(address, tls))[0] == 206
        made.enrolments.revoke("box-1", actor="ann", now=time.time())
        assert (await ask(address, tls))[0] == 403
    with pytest.raises(SettingsError, match="files_url"):
        load_hub_settings(flags={"files_url": "http://hub"})


class _Bare:
    """Shows no certificate."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context

    def context(self) -> ssl.SSLContext:
        return self._context


@pytest.mark.parametrize("files_url", ["", "https://cdn.test/files"])
async def test_jobs_name_where_the_files_are(tmp_path: Path, files_url: str) -> None:
    port = free_port()
    async with made_hub(tmp_path / "hub", files_port=port, files_url=files_url) as made:
        async with Peer(options_of(await made.enrol(tmp_path / "box", "box-1")), "ea/1/dn/box-1/job") as peer:
            begin(made)
            message = await peer.next(60.0)
        keys = [PublicKey(each) for each in director_keys(Authority(made.settings.data_dir, SystemClock())).keys]
        job = msgspec.json.decode(open_envelope(message.payload, JOB_TYPE, keys), type=Job)
        assert job.files == (files_url or f"https://localhost:{port}")
        await until(lambda: made.hub.link.connected, "the hub is still there")
