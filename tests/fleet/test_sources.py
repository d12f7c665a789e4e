"""Where pieces come from: any source will do, none is believed, and a full disk is told with its figures."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from appliance.core.errors import SourceError, StorageError, UnavailableError
from appliance.core.fleet import PIECE_BYTES
from appliance.fleet.download import is_reserved, reserve
from appliance.fleet.sources import (
    LARGE_BYTES,
    MOST_FRUITLESS,
    BlobSource,
    FolderSource,
    MirrorSource,
    Source,
    fetch,
    in_order,
)
from appliance.registry.blobs import Blobs
from appliance.registry.sources import ranges
from tests.fleet.test_hub_source import CONTENT, PIECES, Target
from tests.registry.servers import FileServer, Handler

pytestmark = pytest.mark.anyio


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    opened = Target(tmp_path / "device")
    yield opened
    opened.database.close()


def put(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"sha256-{PIECES.digest}").write_bytes(content)
    return folder


def whole_ranges(handler: Handler) -> bool:
    """Answer `bytes=first-last` with just that."""
    matched = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"])
    assert matched
    first, last = int(matched[1]), int(matched[2])
    body = handler.serves.content[first : last + 1]
    handler.serves.sent += len(body)
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(handler.serves.content)}")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


def mirror(server: FileServer, stall_timeout_s: float = 5.0) -> MirrorSource:
    return MirrorSource(server.url.rsplit("/", 1)[0] + "/", stall_timeout_s=stall_timeout_s)


async def run(target: Target, *sources: Source) -> None:
    with target.open() as download:
        await fetch(download, sources)


async def test_pieces_of_another_file_on_the_box_are_taken_wherever_they_are(target: Target, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(bytes(PIECE_BYTES) + CONTENT[2 * PIECE_BYTES :] + CONTENT[:PIECE_BYTES])
    gone = tmp_path / "gone"
    with pytest.raises(SourceError):
        await run(target, BlobSource(lambda: [gone, old]))
    with target.open() as download:
        assert download.missing == [0, 1, 5]  # what is at no border of pieces is not found
    with FileServer(CONTENT, whole_ranges) as server:
        await run(target, mirror(server))
        assert server.sent == 2 * PIECE_BYTES + len(CONTENT) % PIECE_BYTES
    assert target.is_right()


async def test_a_folder_gives_what_it_has_and_a_mirror_the_rest(target: Target, tmp_path: Path) -> None:
    folder = put(tmp_path / "stick", CONTENT[: 3 * PIECE_BYTES])
    with FileServer(CONTENT, whole_ranges) as server:
        await run(target, FolderSource(tmp_path / "empty"), FolderSource(folder), mirror(server))
        assert server.ranges() == [f"bytes={3 * PIECE_BYTES}-{len(CONTENT) - 1}"]
    assert target.is_right()


async def test_a_folder_with_flipped_bits_is_left_after_two_lies_and_changes_nothing(
    target: Target, tmp_path: Path
) -> None:
    folder = put(tmp_path / "stick", bytes(len(CONTENT)))
    with pytest.raises(SourceError) as refusal:
        await run(target, FolderSource(folder))
    assert refusal.value.code == "source_lied"
    with target.open() as download:
        assert download.percent == 0
        with pytest.raises(SourceError, match="is left"):
            download.check_source(FolderSource(folder).name)


async def test_a_mirror_that_lies_is_left_for_one_that_does_not(target: Target) -> None:
    with FileServer(bytes(len(CONTENT)), whole_ranges) as liar, FileServer(CONTENT, whole_ranges) as honest:
        await run(target, mirror(liar), mirror(honest))
        assert len(liar.requests) == 1
        assert len(honest.requests) == 1
    assert target.is_right()


async def test_a_server_that_drips_is_given_up_although_it_is_never_silent(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "LEAST_BYTES_PER_S", 10 * PIECE_BYTES)

    def drip(handler: Handler) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        for at in range(200):
            try:
                handler.wfile.write(CONTENT[at : at + 1])
                handler.wfile.flush()
            except OSError:
                break
            time.sleep(0.02)
        handler.close_connection = True
        return True

    with FileServer(CONTENT, drip) as server, pytest.raises(SourceError) as refusal:
        await run(target, mirror(server, stall_timeout_s=0.5))
    assert refusal.value.code == "source_slow"


@pytest.mark.parametrize(
    ("status", "header", "code"),
    [
        (404, {}, "gone"),
        (500, {}, "source_failed"),
        (200, {}, "source_failed"),
        (206, {"Content-Range": "bytes 5-9/10"}, "source_failed"),
        (206, {}, "source_failed"),
        (206, {"Content-Encoding": "gzip"}, "source_failed"),
    ],
)
async def test_a_mirror_with_another_answer_than_was_asked_for_is_refused(
    target: Target, status: int, header: dict[str, str], code: str
) -> None:
    def answer(handler: Handler) -> bool:
        handler.send_response(status)
        for name, value in header.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    with target.open() as download:
        await download.put_piece(0, CONTENT[:PIECE_BYTES], "test")  # so that no answer can be the whole file
        with FileServer(CONTENT, answer) as server, pytest.raises(SourceError) as refusal:
            await fetch(download, [mirror(server)])
    assert refusal.value.code == code


async def test_a_mirror_that_breaks_off_keeps_what_came(target: Target) -> None:
    def break_off(handler: Handler) -> bool:
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"]).groups()  # type: ignore[union-attr]
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        handler.send_header("Content-Length", str(int(last) - int(first) + 1))
        handler.end_headers()
        useful = PIECE_BYTES if first == "0" else 0
        handler.wfile.write(CONTENT[int(first) : int(first) + useful + 100])
        handler.close_connection = True
        return True

    with FileServer(CONTENT, break_off) as server, pytest.raises(SourceError):
        await run(target, mirror(server))
    assert len(server.requests) == 1 + MOST_FRUITLESS, "it is asked again while that is of use"
    with target.open() as download:
        assert download.missing == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("address", ["http://example.com", "ftp://127.0.0.1", "nonsense"])
async def test_only_https_and_loopback_are_fetched_from(target: Target, address: str) -> None:
    with pytest.raises(SourceError):
        await run(target, MirrorSource(address))


class Unreachable:
    name = "nowhere"

    async def deliver(self, download: object) -> None:
        raise UnavailableError("no route")


async def test_what_cannot_be_reached_now_is_not_called_gone(target: Target, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as refusal:
        await run(target, FolderSource(tmp_path), Unreachable())
    assert refusal.value.code == "unreachable"


def test_a_large_file_prefers_mirrors_and_a_small_one_the_hub() -> None:
    here, folder, mirrored, hub, patient = (Unreachable() for _ in range(5))
    given = {"here": here, "folders": [folder], "mirrors": [mirrored], "hub": hub, "patient_hub": patient}
    assert in_order(LARGE_BYTES, **given) == [here, folder, mirrored, patient]  # type: ignore[arg-type]
    assert in_order(LARGE_BYTES - 1, **given) == [here, folder, hub, mirrored, patient]  # type: ignore[arg-type]
    assert in_order(1, **{**given, "mirrors": []}) == [here, folder, patient]  # type: ignore[arg-type]
    assert in_order(1, **{**given, "patient_hub": None, "hub": None}) == [here, folder, mirrored]  # type: ignore[arg-type]


# The disk


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "from pathlib import Path\n"
        "from appliance.core.errors import StorageError\n"
        "from appliance.fleet.download import reserve\n"
        "from appliance.registry.blobs import Blobs\n"
        "from tests.fleet.test_hub_source import PIECES\n"
        "try:\n    reserve(Blobs(Path(sys.argv[1])), PIECES)\n"
        "except StorageError as error:\n    print(error.code, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(blobs.folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout.startswith("disk_full The disk is full"), run.stderr
    with blobs.partial(PIECES.digest) as partial:
        assert partial.size == 0


def test_what_is_reserved_is_there_and_what_a_pull_left_is_looked_at(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    with blobs.partial(PIECES.digest) as partial:
        partial.append(CONTENT[: 2 * PIECE_BYTES])
    assert not is_reserved(blobs, PIECES)
    reserve(blobs, PIECES)
    assert is_reserved(blobs, PIECES)
    path = blobs.partial_folder / f"sha256-{PIECES.digest}"
    assert path.stat().st_blocks * 512 >= len(CONTENT)
    assert (path.with_name(path.name + ".blocks")).read_bytes().count(1) == 32


async def test_the_beginning_that_an_interrupted_pull_left_is_taken_over(tmp_path: Path) -> None:
    target_folder = tmp_path / "device"
    blobs = Blobs(target_folder / "models" / "blobs")
    with blobs.partial(PIECES.digest) as partial:
        partial.append(CONTENT[: 2 * PIECE_BYTES])
    reserve(blobs, PIECES)
    opened = Target(target_folder)
    with ExitStack() as stack:
        stack.callback(opened.database.close)
        download = stack.enter_context(opened.open())
        await download.recover()
        assert download.missing == [2, 3, 4, 5]


def test_a_disk_that_fills_up_is_a_storage_error_with_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.registry.blobs.free_bytes", lambda _: 1000)
    with pytest.raises(StorageError) as refusal:
        reserve(Blobs(tmp_path / "blobs"), PIECES)
    assert refusal.value.code == "disk_full"
    assert "5.3 MB" in str(refusal.value)
