from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.settings import Settings
from appliance.registry.install import import_model
from appliance.registry.install_onnx import import_onnx
from appliance.registry.known import ModelFile, RegisteredModel
from appliance.registry.versions import Registry, open_registry
from appliance.store.database import Database
from tests.registry import processes
from tests.registry.models import TinyModel
from tests.tiny_encoders import TINY, random_weights, write_bert, write_tiny_encoder
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture
def model(registry: Registry, tiny: TinyModel) -> RegisteredModel:
    return import_model(tiny.path, registry, name="tiny").model


@pytest.fixture
def data(registry: Registry) -> Path:
    return registry.blobs.folder.parent.parent


def test_a_registered_model_is_listed_as_it_was_registered(registry: Registry, model: RegisteredModel) -> None:
    assert registry.list() == [model]
    assert model.full_name == "tiny:1"
    assert model.size == model.files[0].size == model.files[0].path.stat().st_size


def test_every_field_survives_the_database(registry: Registry, tiny: TinyModel) -> None:
    path = registry.blobs.path(tiny.sha256)
    model = RegisteredModel(
        name="full",
        version="1.0-rc.2",
        kind="gguf",
        task="completion",
        licence="MIT OR Apache-2.0",
        created=1_800_000_000,
        files=(ModelFile("model", path, tiny.sha256, tiny.size),),
        architecture="llama",
        quantisation="Q4_K_M",
        context_length=2**30,
        minimum_memory=2**40,
        chat_template="{{ '模板' }}",
        stop=("<|im_end|>", '"', "。"),
        default_context=4096,
    )
    assert registry.register(model, "a test") == model
    assert registry.resolve("full:1.0-rc.2") == model


def test_a_name_alone_is_the_version_registered_last(registry: Registry, tmp_path: Path, tiny: TinyModel) -> None:
    import_model(tiny.path, registry, name="tiny", version="9")
    import_model(write_tiny_llama(tmp_path / "b.gguf", seed=1), registry, name="tiny", version="2")
    assert registry.resolve("tiny").version == "2"
    assert registry.resolve("tiny:9").version == "9"
    registry.remove("tiny:2")
    assert registry.resolve("tiny").version == "9"


@pytest.mark.parametrize("name", ["other", "tiny:2", "", "tiny:", ":1", "TINY", "tiny:1:1", "\ud800", "x" * 100_000])
def test_an_unknown_name_is_answered_with_those_there_are(
    registry: Registry, model: RegisteredModel, name: str
) -> None:
    with pytest.raises(NotFoundError, match=f"there are: {model.full_name}") as refused:
        registry.resolve(name)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert len(refused.value.message) < 300


def test_what_was_read_is_kept_until_anyone_writes(
    registry: Registry, model: RegisteredModel, tmp_path: Path, data: Path
) -> None:
    first = registry.list()
    first.clear()
    assert registry.list() == [model]
    assert registry.list()[0] is registry.list()[0]
    other = Database(data / "appliance.db")
    try:
        for number in range(3):
            path = write_tiny_llama(tmp_path / "more.gguf", seed=number + 10)
            import_model(path, Registry(other, registry.blobs), name="more", licence="MIT")
            assert [each.version for each in registry.list() if each.name == "more"][-1] == str(number + 1)
            if number == 1:
                registry.remove(model.full_name)
            assert (model in registry.list()) == (number < 1)
    finally:
        other.close()


def test_without_any_model_the_answer_says_how_to_get_one(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="none at all yet") as refused:
        registry.resolve("tiny")
    assert "appliance models pull" in refused.value.advice


def test_registering_the_same_again_changes_nothing(registry: Registry, model: RegisteredModel) -> None:
    assert registry.register(dataclasses.replace(model, created=1), "again") == model
    assert registry.list() == [model]


def test_other_files_under_a_known_name_and_version_are_refused(
    registry: Registry, model: RegisteredModel, tmp_path: Path
) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", seed=1)
    with pytest.raises(ConflictError, match="tiny:1 already"):
        import_model(other, registry, name="tiny", version="1")
    assert registry.list() == [model]


def test_of_two_that_register_one_name_at_once_the_second_is_refused(
    registry: Registry, model: RegisteredModel
) -> None:
    other = dataclasses.replace(model, files=(dataclasses.replace(model.files[0], sha256="e" * 64),))
    with pytest.raises(ConflictError, match="tiny:1 already"):
        registry.register(other, "a test")
    assert registry.list() == [model]


def test_changes_leave_an_audit_row(registry: Registry, model: RegisteredModel) -> None:
    registry.remove("tiny")
    rows = registry._database.read(
        lambda connection: connection.execute("SELECT action, subject FROM audit ORDER BY id").fetchall()
    )
    assert [tuple(row) for row in rows] == [("model.register", "tiny:1"), ("model.remove", "tiny:1")]


def test_removing_frees_the_file(registry: Registry, model: RegisteredModel) -> None:
    assert registry.remove("tiny") == (model, model.size)
    assert registry.list() == []
    assert list(registry.blobs.folder.iterdir()) == []


def test_a_file_that_another_version_uses_stays(registry: Registry, model: RegisteredModel, tiny: TinyModel) -> None:
    import_model(tiny.path, registry, name="other")
    assert registry.remove("tiny") == (model, 0)
    assert registry.blobs.has(tiny.sha256, tiny.size)
    assert registry.remove("other")[1] == tiny.size


def test_removing_also_sweeps_what_a_crash_left(registry: Registry, model: RegisteredModel) -> None:
    with registry.blobs.partial("e" * 64) as partial:
        partial.append(b"published, then the power failed")
        partial.publish("e" * 64)
    assert registry.remove("tiny")[1] == model.size + 32
    assert list(registry.blobs.folder.iterdir()) == []


def test_a_model_whose_file_is_lost_can_be_removed(registry: Registry, model: RegisteredModel) -> None:
    model.files[0].path.unlink()
    assert registry.remove("tiny") == (model, 0)
    assert registry.list() == []


def test_a_held_model_is_not_removed_until_it_is_released(registry: Registry, model: RegisteredModel) -> None:
    hold = registry.hold(model)
    with registry.hold(model), pytest.raises(ConflictError, match="in use"):
        registry.remove("tiny")
    with pytest.raises(ConflictError, match="in use"):
        registry.remove("tiny")
    assert registry.list() == [model]
    hold.close()
    registry.remove("tiny")
    assert registry.list() == []


def test_a_model_that_shares_no_more_than_a_tokenizer_with_a_held_one_is_removed(
    registry: Registry, tmp_path: Path
) -> None:
    for seed in range(2):
        folder = write_tiny_encoder(tmp_path / f"encoder-{seed}")
        write_bert(folder / "model.onnx", random_weights(TINY, seed=seed), TINY)
        import_onnx(folder, registry, name=f"encoder-{seed}", licence="MIT")
    held, other = (registry.resolve(f"encoder-{seed}") for seed in range(2))
    with registry.hold(held):
        with pytest.raises(ConflictError):
            registry.remove("encoder-0")
        registry.remove("encoder-1")
    assert all(each.path.exists() for each in held.files)
    graph, tokenizer = other.file("model"), other.file("tokenizer.json")
    assert graph is not None
    assert tokenizer is not None
    assert not graph.path.exists()
    assert tokenizer.path.exists()


def test_a_model_that_another_process_has_loaded_is_not_removed_until_that_dies(
    registry: Registry, model: RegisteredModel, data: Path
) -> None:
    with processes.holding(data, "tiny") as holder:
        with pytest.raises(ConflictError, match=f"in use by process {holder.pid}") as refused:
            registry.remove("tiny")
        assert refused.value.code == "model_in_use"
        assert registry.list() == [model]
        assert model.files[0].path.exists()
        holder.kill()
        holder.wait(timeout=20)
        registry.remove("tiny")
    assert registry.list() == []


def test_what_another_process_removed_is_gone_here_at_once(
    registry: Registry, model: RegisteredModel, data: Path
) -> None:
    assert processes.run("models", "remove", "tiny", "--yes", "--data", str(data)).returncode == 0
    assert registry.list() == []
    with pytest.raises(NotFoundError):
        registry.hold(model)


def test_a_model_removed_by_two_is_removed_once(registry: Registry, model: RegisteredModel, data: Path) -> None:
    database = Database(data / "appliance.db")
    other = Registry(database, registry.blobs)
    resolve = other.resolve
    try:

        def removed_meanwhile(name: str) -> RegisteredModel:
            found = resolve(name)
            registry.remove(name)
            return found

        other.resolve = removed_meanwhile  # type: ignore[method-assign]
        with pytest.raises(NotFoundError, match="someone else"):
            other.remove("tiny")
    finally:
        database.close()


def test_a_hold_on_files_exchanged_meanwhile_is_refused_and_released(
    registry: Registry, model: RegisteredModel, tmp_path: Path, tiny: TinyModel
) -> None:
    import_model(tiny.path, registry, name="keeps-the-file")
    registry.remove("tiny")
    import_model(write_tiny_llama(tmp_path / "new.gguf", seed=1), registry, name="tiny", version="1")
    with pytest.raises(NotFoundError, match="exchanged meanwhile"):
        registry.hold(model)
    registry.remove("keeps-the-file")
    assert not registry.blobs.has(tiny.sha256, tiny.size)


def test_the_registry_of_a_data_folder_is_opened_from_the_settings(
    registry: Registry, model: RegisteredModel, data: Path
) -> None:
    settings = Settings(data_dir=data)
    database = Database(settings.database_path)
    try:
        assert open_registry(settings, database).list() == [model]
    finally:
        database.close()
