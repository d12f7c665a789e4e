from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.core.errors import ConflictError, ModelFileError, StorageError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.registry import layout
from appliance.registry.blobs import Blobs
from appliance.registry.known import ModelFile, RegisteredModel
from appliance.registry.layout import lay_out, layout_name, remove_stale_layouts
from appliance.registry.versions import Registry
from appliance.store.locks import Hold, lock

FILES = {"model": b"graph", "tokenizer.json": b"{}", "1_Pooling/config.json": b"{}", "model.onnx_data": b"\0" * 64}
SIGNATURE = ModelSignature(
    inputs=(TensorSpec("input_ids", Datatype.INT64, (-1, -1)),),
    outputs=(TensorSpec("last_hidden_state", Datatype.FP32, (-1, -1, 384)),),
    batched=True,
    longest_batch=32,
    opset=17,
)


def stored(blobs: Blobs, role: str, content: bytes) -> ModelFile:
    digest = hashlib.sha256(content).hexdigest()
    with blobs.unnamed_partial() as partial:
        partial.append(content)
        partial.publish(digest)
    return ModelFile(role, blobs.path(digest), digest, len(content))


def model_of(blobs: Blobs, files: dict[str, bytes]) -> RegisteredModel:
    return RegisteredModel(
        name="encoder",
        version="1",
        kind="onnx",
        task="embedding",
        licence="MIT",
        created=1_800_000_000,
        files=tuple(stored(blobs, role, content) for role, content in sorted(files.items())),
        architecture="bert",
        quantisation="int8",
        context_length=256,
        minimum_memory=10**8,
        chat_template=None,
        stop=(),
        default_context=None,
        signature=SIGNATURE,
    )


@pytest.fixture
def model(blobs: Blobs) -> RegisteredModel:
    return model_of(blobs, FILES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "onnx"


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


LAID_OUT = {"model.onnx" if role == "model" else role: content for role, content in FILES.items()}


def test_a_model_of_several_files_survives_the_database(registry: Registry, model: RegisteredModel) -> None:
    assert registry.register(model, "a test") == model
    assert registry.resolve("encoder") == model
    assert registry.register(model, "a test again") == model
    graph = model.file("model")
    assert graph is not None
    assert graph.path.read_bytes() == b"graph"
    assert model.file("labels.txt") is None
    with registry.hold(model), pytest.raises(ConflictError):
        registry.remove("encoder")
    registry.remove("encoder")  # two of its files are one blob
    assert list(registry.blobs.folder.iterdir()) == []


def test_files_that_changed_places_are_other_files(registry: Registry, blobs: Blobs) -> None:
    registry.register(model_of(blobs, {"model": b"a", "labels.txt": b"b"}), "a test")
    with pytest.raises(ConflictError, match="with other files"):
        registry.registered("encoder", "1", model_of(blobs, {"model": b"b", "labels.txt": b"a"}).digests)


def test_the_files_lie_under_their_roles_as_hard_links(model: RegisteredModel, folder: Path) -> None:
    target = lay_out(model, folder)
    assert target == folder / layout_name(model)
    assert content_of(target) == LAID_OUT
    assert all(
        (target / ("model.onnx" if each.role == "model" else each.role)).samefile(each.path) for each in model.files
    )
    assert list(folder.iterdir()) == [target]


def test_a_folder_that_is_whole_is_left_alone(model: RegisteredModel, folder: Path) -> None:
    made = lay_out(model, folder).stat()
    found = lay_out(model, folder).stat()
    assert (found.st_ino, found.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def damage_missing(target: Path) -> None:
    (target / "tokenizer.json").unlink()


def damage_extra(target: Path) -> None:
    (target / "spy.bin").write_bytes(b"x")


def damage_short(target: Path) -> None:
    (target / "model.onnx").unlink()
    (target / "model.onnx").write_bytes(b"gra")


def damage_link(target: Path) -> None:
    (target / "model.onnx").unlink()
    (target / "model.onnx").symlink_to("/etc/hostname")


def damage_folder(target: Path) -> None:
    target.rename(target.with_name("elsewhere"))
    target.symlink_to("elsewhere")


def damage_file(target: Path) -> None:
    target.rename(target.with_name("elsewhere"))
    target.write_bytes(b"x")


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_extra, damage_short, damage_link, damage_folder, damage_file]
)
def test_a_folder_that_is_not_whole_is_made_again(model: RegisteredModel, folder: Path, damage: object) -> None:
    target = lay_out(model, folder)
    assert callable(damage)
    damage(target)
    assert lay_out(model, folder) == target
    assert not target.is_symlink()
    assert content_of(target) == LAID_OUT


def test_what_a_crash_left_is_replaced(model: RegisteredModel, folder: Path) -> None:
    left = folder / f"unfinished-{layout_name(model)}"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    assert content_of(lay_out(model, folder)) == LAID_OUT
    assert not left.exists()


def test_where_links_are_impossible_the_files_are_copied(
    model: RegisteredModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("appliance.registry.layout.os.link", refuse)
    target = lay_out(model, folder)
    assert content_of(target) == LAID_OUT
    assert (target / "model.onnx").stat().st_nlink == 1
    assert lay_out(model, folder) == target


def test_a_missing_blob_leaves_no_folder(model: RegisteredModel, folder: Path) -> None:
    model.files[0].path.unlink()
    with pytest.raises(StorageError):
        lay_out(model, folder)
    assert not (folder / layout_name(model)).exists()


@pytest.mark.parametrize("role", ["../evil", "/etc/evil", "a/../../evil", "a\\b", "model.onnx", "", "a\0b"])
def test_a_role_that_leaves_the_folder_writes_nothing(model: RegisteredModel, folder: Path, role: str) -> None:
    files = (*model.files, replace(model.files[0], role=role))
    with pytest.raises(ModelFileError):
        lay_out(replace(model, files=files), folder)
    assert not folder.exists()


def test_models_that_differ_in_one_role_have_folders_of_their_own(blobs: Blobs, folder: Path) -> None:
    one, other = (model_of(blobs, {"model": b"g", role: b"x"}) for role in ("labels.txt", "vocab.txt"))
    assert lay_out(one, folder) != lay_out(other, folder)


def test_the_folders_of_removed_models_go(model: RegisteredModel, blobs: Blobs, folder: Path) -> None:
    remove_stale_layouts(folder, [])  # there is no folder yet
    kept, gone = lay_out(model, folder), lay_out(model_of(blobs, {"model": b"other"}), folder)
    (folder / "unfinished-x").mkdir()
    remove_stale_layouts(folder, [model])
    assert list(folder.iterdir()) == [kept]
    assert not gone.exists()


def test_a_folder_that_another_process_works_on_is_waited_for(
    model: RegisteredModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_WAIT_S", 0.05)
    folder.mkdir(parents=True)
    with Hold([lock(folder, os.O_RDONLY, exclusive=True)]), pytest.raises(ConflictError, match="busy"):
        lay_out(model, folder)
    assert content_of(lay_out(model, folder)) == LAID_OUT
