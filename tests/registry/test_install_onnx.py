from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from appliance.core.errors import ApplianceError, ConflictError, InvalidRequestError, ModelFileError, SourceError
from appliance.registry.catalog import CatalogEntry
from appliance.registry.install import find_installed, pull
from appliance.registry.install_onnx import GROWTH, import_onnx
from appliance.registry.layout import lay_out
from appliance.registry.manifest import Manifest
from appliance.registry.verify import verify
from appliance.registry.versions import Registry
from tests.registry.models import assert_nothing_visible, partial_names
from tests.registry.onnx_models import changed, write_encoder_folder, write_folder
from tests.tiny_onnx import external, tabular


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_encoder_folder(tmp_path / "tiny-encoder")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def entry_of(folder: Path, **changes: Any) -> CatalogEntry:
    """Return the manifest of a folder, which is the files' source too."""
    files = []
    for name, content in contents(folder).items():
        file: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        file |= {"role": "model", "name": name} if name == "model.onnx" else {"role": name}
        files.append(file | {"sources": [{"kind": "file", "path": "."}]})
    document = {
        "name": "tiny-encoder",
        "version": "1",
        "kind": "onnx",
        "task": "embedding",
        "licence": "MIT",
        "minimum_memory": 10**8,
        "files": files,
    }
    return CatalogEntry(msgspec.convert(document | changes, Manifest), folder)


def test_a_folder_is_imported_with_all_that_belongs_to_it(registry: Registry, folder: Path, tmp_path: Path) -> None:
    model = import_onnx(folder, registry, licence="MIT").model
    assert (model.full_name, model.kind, model.task) == ("tiny-encoder:1", "onnx", "embedding")
    assert (model.architecture, model.quantisation, model.context_length) == ("bert", "fp32", 256)
    assert model.signature is not None
    assert model.signature.batched
    assert model.minimum_memory == GROWTH * model.size + 135_000_000
    assert registry.resolve("tiny-encoder") == model
    (folder / "README.md").unlink()
    assert contents(lay_out(model, tmp_path / "onnx")) == contents(folder)
    assert [each.problem for each in verify([model])] == [""] * 6
    assert partial_names(registry) == []


def test_importing_the_same_again_changes_nothing(registry: Registry, folder: Path) -> None:
    first = import_onnx(folder, registry)
    again = import_onnx(folder, registry)
    assert (first.was_present, again.was_present) == (False, True)
    assert again.model == first.model


def test_another_tokenizer_makes_another_version(registry: Registry, folder: Path) -> None:
    import_onnx(folder, registry)
    write_folder(folder, {"tokenizer.json": {"version": "2.0"}})
    assert import_onnx(folder, registry).model.version == "2"
    with pytest.raises(ConflictError, match="with other files"):
        import_onnx(folder, registry, version="1")
    assert [each.version for each in registry.list()] == ["1", "2"]


def test_a_single_graph_is_a_model_of_tensors(registry: Registry, tmp_path: Path) -> None:
    path = changed(
        tabular(tmp_path / "Iris Model.onnx"), lambda model: model.metadata_props.add(key="license", value="mit")
    )
    model = import_onnx(path, registry).model
    assert (model.full_name, model.task, model.architecture) == ("iris-model:1", "tensor", "onnx")
    assert (model.licence, model.context_length) == ("MIT", 0)


def test_a_graph_called_model_is_named_after_its_folder(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "bge-small-en-v1.5" / "onnx").mkdir(parents=True)
    path = tabular(tmp_path / "bge-small-en-v1.5" / "onnx" / "model.onnx")
    assert import_onnx(path, registry).model.name == "bge-small-en-v1.5"


def test_onnxruntime_finds_the_data_files_where_they_are_laid_out(registry: Registry, tmp_path: Path) -> None:
    source = tmp_path / "big"
    (source / "data").mkdir(parents=True)
    external(source / "model.onnx", "data/weights.bin")
    model = import_onnx(source, registry).model
    target = lay_out(model, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": np.ones((1, 4), np.float32)})
    assert answer.tolist() == [[2.0] * 4]


def test_a_folder_of_links_into_a_cache_is_taken(registry: Registry, folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    for path in [each for each in folder.rglob("*") if each.is_file()]:
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert import_onnx(snapshot, registry).model.digests == import_onnx(folder, registry).model.digests


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("")


def damage_graph(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[:-100])


def damage_data(folder: Path) -> None:
    external(folder / "model.onnx")
    (folder / "weights.bin").write_bytes(bytes(63))


def damage_name(folder: Path) -> None:
    external(folder / "model.onnx", "tokenizer.json")


def damage_pipe(folder: Path) -> None:
    external(folder / "model.onnx")
    (folder / "weights.bin").unlink()
    os.mkfifo(folder / "weights.bin")


@pytest.mark.parametrize(
    "damage", [damage_config, damage_tokenizer, damage_graph, damage_data, damage_name, damage_pipe]
)
def test_of_a_damaged_folder_nothing_is_kept(registry: Registry, folder: Path, damage: Any) -> None:
    damage(folder)
    with pytest.raises(ApplianceError) as refused:
        import_onnx(folder, registry)
    assert isinstance(refused.value, InvalidRequestError)
    assert_nothing_visible(registry)
    assert partial_names(registry) == []


def test_a_task_that_cannot_be_is_refused_before_the_copy(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot be for rerank: it has no tokenizer\.json"):
        import_onnx(tabular(tmp_path / "model.onnx"), registry, name="x", task="rerank")
    assert_nothing_visible(registry)


@pytest.mark.parametrize("argument", ["name", "version", "licence"])
def test_names_that_cannot_be_are_refused(registry: Registry, folder: Path, argument: str) -> None:
    arguments: dict[str, Any] = {argument: "../x y"}
    with pytest.raises(InvalidRequestError):
        import_onnx(folder, registry, **arguments)
    assert_nothing_visible(registry)


def test_a_manifest_of_several_files_is_pulled_as_one_model(registry: Registry, folder: Path) -> None:
    (folder / "README.md").unlink()
    entry = entry_of(folder)
    assert find_installed(entry, registry) is None
    pulled = pull(entry, registry, stall_timeout_s=5)
    assert (pulled.model.task, pulled.model.context_length, pulled.was_present) == ("embedding", 256, False)
    assert pulled.model.digests == {each.role: each.sha256 for each in entry.manifest.files}
    assert pull(entry, registry, stall_timeout_s=5).was_present
    assert find_installed(entry, registry) == pulled.model == registry.resolve("tiny-encoder")


def test_several_files_come_from_a_folder_that_a_person_names(registry: Registry, folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").unlink()
    entry = entry_of(folder)
    stick = folder.rename(tmp_path / "stick")
    with pytest.raises(SourceError):
        pull(entry, registry, stall_timeout_s=5)
    assert_nothing_visible(registry)
    assert pull(entry, registry, stall_timeout_s=5, only_source=str(stick)).model.size == entry.manifest.size


def test_a_pull_goes_on_where_a_missing_file_stopped_it(registry: Registry, folder: Path) -> None:
    (folder / "README.md").unlink()
    entry = entry_of(folder)
    graph = (folder / "model.onnx").rename(folder / "away")
    with pytest.raises(SourceError, match=r"model\.onnx"):
        pull(entry, registry, stall_timeout_s=5)
    assert registry.list() == []
    graph.rename(folder / "model.onnx")
    (folder / "tokenizer.json").unlink()  # it is here already
    assert pull(entry, registry, stall_timeout_s=5).model.task == "embedding"


def test_a_manifest_for_text_without_a_tokenizer_is_refused(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    tabular(folder / "model.onnx")
    with pytest.raises(ModelFileError, match=r"tiny-encoder:1: The model cannot be for embedding: it has no tokenizer"):
        pull(entry_of(folder), registry, stall_timeout_s=5)
    assert_nothing_visible(registry)
    assert partial_names(registry) == []
    assert pull(entry_of(folder, task="tensor"), registry, stall_timeout_s=5).model.task == "tensor"


def test_two_models_share_the_files_they_have_in_common(registry: Registry, folder: Path) -> None:
    import_onnx(folder, registry, name="one")
    before = len(list(registry.blobs.folder.iterdir()))
    write_folder(folder, {"tokenizer.json": {"version": "2.0"}})
    import_onnx(folder, registry, name="two")
    assert len(list(registry.blobs.folder.iterdir())) == before + 1
    registry.remove("one")
    assert [each.problem for each in verify(registry.list())] == [""] * 6


def test_a_damaged_file_of_several_is_named(registry: Registry, folder: Path) -> None:
    model = import_onnx(folder, registry).model
    tokenizer = model.file("tokenizer.json")
    assert tokenizer is not None
    tokenizer.path.chmod(0o644)
    tokenizer.path.write_bytes(b"x" * tokenizer.size)
    (bad,) = [each for each in verify([model]) if each.problem]
    assert bad.file.role == "tokenizer.json"
