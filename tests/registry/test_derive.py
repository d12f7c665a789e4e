"""A model that was made of another one: what it shares with it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from appliance.core.errors import ConflictError, InvalidRequestError, ModelFileError
from appliance.registry.derive import register_derived
from appliance.registry.install import Installed
from appliance.registry.install_onnx import import_onnx
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry
from tests import tiny_encoders, tiny_onnx
from tests.registry.models import partial_names


@pytest.fixture
def encoder(registry: Registry, tmp_path: Path) -> RegisteredModel:
    folder = tiny_encoders.write_tiny_encoder(tmp_path / "encoder")
    return import_onnx(folder, registry, name="encoder", licence="MIT").model


@pytest.fixture
def other_graph(tmp_path: Path) -> Path:
    """The encoder with other weights."""
    path = tmp_path / "other.onnx"
    return tiny_encoders.write_bert(path, tiny_encoders.random_weights(tiny_encoders.TINY, seed=1), tiny_encoders.TINY)


def derive(
    registry: Registry, original: RegisteredModel, graph: Path, *, name: str = "copy", version: str | None = None
) -> Installed:
    with registry.hold(original):
        return register_derived(original, {"model": graph}, registry, replaced=frozenset(), name=name, version=version)


def test_it_has_its_own_graph_and_the_original_s_other_files(
    registry: Registry, encoder: RegisteredModel, other_graph: Path
) -> None:
    made = derive(registry, encoder, other_graph)
    assert not made.was_present
    model = registry.resolve("copy:1")
    assert model == made.model
    assert (model.task, model.licence, model.signature) == ("embedding", "MIT", encoder.signature)
    differing = {role for role, sha256 in model.digests.items() if encoder.digests[role] != sha256}
    assert (differing, model.digests.keys()) == ({"model"}, encoder.digests.keys())
    assert model.minimum_memory == encoder.minimum_memory + model.size - encoder.size
    registry.remove("encoder")
    assert all(registry.blobs.has(each.sha256, each.size) for each in model.files)
    assert partial_names(registry) == []


def test_the_same_again_changes_nothing(registry: Registry, encoder: RegisteredModel, other_graph: Path) -> None:
    first = derive(registry, encoder, other_graph)
    again = derive(registry, encoder, other_graph)
    assert again == Installed(first.model, was_present=True)
    assert derive(registry, encoder, other_graph, version="2").model.version == "2"
    assert len(registry.list()) == 3


def test_a_name_with_other_files_is_not_taken(registry: Registry, encoder: RegisteredModel, other_graph: Path) -> None:
    with pytest.raises(ConflictError):
        derive(registry, encoder, other_graph, name="encoder", version="1")
    assert registry.list() == [encoder]
    assert partial_names(registry) == []
    assert len(list(registry.blobs.folder.iterdir())) == len(encoder.digests)


def test_data_beside_the_graph_takes_the_place_of_the_original_s(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    graph = tiny_onnx.external(tmp_path / "model" / "wide.onnx")
    original = import_onnx(graph, registry, name="wide").model
    made = tmp_path / "made"
    made.mkdir()
    loaded = onnx.load(graph)
    onnx.save(loaded, made / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    files = {"model": made / "model.onnx", "model.onnx.data": made / "model.onnx.data"}
    with registry.hold(original):
        derived = register_derived(
            original, files, registry, replaced=frozenset({"weights.bin"}), name="copy", version=None
        )
        assert set(derived.model.digests) == {"model", "model.onnx.data"}
        with pytest.raises(ModelFileError, match="missing"):
            register_derived(
                original, {"model": files["model"]}, registry, replaced=frozenset(), name="torn", version=None
            )
    assert len(registry.list()) == 2


def test_a_damaged_graph_is_not_registered(registry: Registry, encoder: RegisteredModel, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        derive(registry, encoder, tiny_onnx.truncated(tmp_path / "half.onnx"))
    with pytest.raises(InvalidRequestError, match="The name"):
        derive(registry, encoder, tiny_onnx.tabular(tmp_path / "a.onnx"), name="Über")
    assert registry.list() == [encoder]
    assert partial_names(registry) == []
