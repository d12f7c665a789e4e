"""LoRA adapters in the registry: names without ambiguity, and nobody loses what another needs."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.core.errors import ConflictError, InvalidRequestError, ModelFileError, NotFoundError
from appliance.registry.catalog import Catalog
from appliance.registry.install import import_adapter, import_model, pull
from appliance.registry.known import RegisteredModel
from appliance.registry.manifest import parse_manifest
from appliance.registry.verify import verify
from appliance.registry.versions import Registry
from appliance.store.database import Database
from appliance.store.migrations import MIGRATIONS, migrate
from tests.registry import processes
from tests.registry.models import TinyModel, as_toml, assert_nothing_visible, document, entry, partial_names
from tests.tiny_gguf import write_tiny_llama, write_tiny_lora


@pytest.fixture
def base(registry: Registry, tiny: TinyModel) -> RegisteredModel:
    return import_model(tiny.path, registry, name="tiny").model


@pytest.fixture
def lora(tmp_path: Path, tiny: TinyModel) -> TinyModel:
    path = write_tiny_lora(tmp_path / "lora.gguf", tiny.path)
    content = path.read_bytes()
    return TinyModel(path, content, hashlib.sha256(content).hexdigest())


@pytest.fixture
def adapter(registry: Registry, base: RegisteredModel, lora: TinyModel) -> RegisteredModel:
    return import_adapter(lora.path, registry, base="tiny", name="legal", licence="MIT").model


def names(registry: Registry) -> list[str]:
    return [each.full_name for each in registry.list()]


def add_version(registry: Registry, folder: Path, seed: int, version: str | None = None) -> RegisteredModel:
    path = write_tiny_llama(folder / f"version-{seed}.gguf", seed=seed)
    return import_model(path, registry, name="tiny", version=version).model


def test_an_imported_adapter_is_its_bases_in_all_but_its_own(
    registry: Registry, base: RegisteredModel, adapter: RegisteredModel, lora: TinyModel
) -> None:
    assert registry.list() == [base, adapter]
    assert adapter.full_name == "tiny:1:legal"
    assert (adapter.kind, adapter.adapter, adapter.rank, adapter.licence) == ("lora", "legal", 4, "MIT")
    assert (adapter.task, adapter.architecture, adapter.context_length) == ("chat", "llama", 512)
    assert (adapter.size, adapter.minimum_memory) == (lora.size, lora.size)
    assert adapter.files[0].path.read_bytes() == lora.content
    assert partial_names(registry) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tiny", "tiny:1"),
        ("tiny:1", "tiny:1"),
        ("tiny:legal", "tiny:1:legal"),
        ("tiny:1:legal", "tiny:1:legal"),
    ],
)
def test_each_form_of_a_name_means_one_thing(
    registry: Registry, adapter: RegisteredModel, name: str, found: str
) -> None:
    assert registry.resolve(name).full_name == found


@pytest.mark.parametrize("name", ["legal", "tiny:medical", "tiny:2:legal", "tiny::legal", "tiny:legal:1", "tiny:1:"])
def test_an_unknown_adapter_is_answered_with_those_there_are(
    registry: Registry, adapter: RegisteredModel, name: str
) -> None:
    with pytest.raises(NotFoundError, match="there are: tiny:1, tiny:1:legal"):
        registry.resolve(name)


def test_the_short_name_is_that_of_the_newest_version_that_has_such_an_adapter(
    registry: Registry, adapter: RegisteredModel, tmp_path: Path
) -> None:
    second = add_version(registry, tmp_path, 1)
    assert registry.resolve("tiny").full_name == "tiny:2"
    assert registry.resolve("tiny:legal").full_name == "tiny:1:legal"
    path = write_tiny_lora(tmp_path / "second.gguf", second.files[0].path, seed=9)
    import_adapter(path, registry, base="tiny:2", name="legal")
    assert registry.resolve("tiny:legal").full_name == "tiny:2:legal"
    assert registry.resolve("tiny:1:legal") == adapter
    assert names(registry) == ["tiny:1", "tiny:1:legal", "tiny:2", "tiny:2:legal"]


def test_a_version_called_as_an_adapter_is_refused_and_nothing_changed(
    registry: Registry, adapter: RegisteredModel, tmp_path: Path, tiny: TinyModel
) -> None:
    before = registry.list()
    with pytest.raises(ConflictError, match="tiny:legal would mean both") as refused:
        add_version(registry, tmp_path, 1, "legal")
    assert refused.value.code == "model_exists"
    assert "appliance models remove tiny:legal" in refused.value.advice
    with pytest.raises(ConflictError, match="tiny:legal would mean both"):
        pull(entry(tiny, version="legal"), registry, stall_timeout_s=5)
    assert registry.list() == before
    assert partial_names(registry) == []


def test_an_adapter_called_as_a_version_is_refused_and_nothing_changed(
    registry: Registry, adapter: RegisteredModel, lora: TinyModel, tmp_path: Path
) -> None:
    add_version(registry, tmp_path, 1, "special")
    before = registry.list()
    for base in ("tiny:1", "tiny:special"):
        with pytest.raises(ConflictError, match="tiny:special would mean both"):
            import_adapter(lora.path, registry, base=base, name="special")
    assert registry.list() == before


def test_of_a_version_and_an_adapter_that_are_registered_at_once_the_second_is_refused(
    registry: Registry, adapter: RegisteredModel, base: RegisteredModel
) -> None:
    with pytest.raises(ConflictError, match="tiny:legal would mean both"):
        registry.register(replace(base, version="legal"), "a test")
    with pytest.raises(ConflictError, match="tiny:1 would mean both"):
        registry.register(replace(adapter, adapter="1"), "a test")
    assert registry.list() == [base, adapter]


def test_another_model_may_have_an_adapter_of_the_same_name(
    registry: Registry, adapter: RegisteredModel, lora: TinyModel, tiny: TinyModel
) -> None:
    import_model(tiny.path, registry, name="other", version="legal")
    with pytest.raises(ConflictError):
        import_adapter(lora.path, registry, base="other", name="legal")
    import_adapter(lora.path, registry, base="other", name="medical")
    assert names(registry) == ["tiny:1", "tiny:1:legal", "other:legal", "other:legal:medical"]
    assert len(list(registry.blobs.folder.iterdir())) == 2  # they share their bytes


def test_importing_the_same_again_changes_nothing(
    registry: Registry, adapter: RegisteredModel, lora: TinyModel
) -> None:
    again = import_adapter(lora.path, registry, base="tiny", name="legal")
    assert again.was_present
    assert again.model == adapter
    assert registry.register(replace(adapter, created=1), "again") == adapter


def test_other_bytes_under_the_same_name_are_refused(
    registry: Registry, base: RegisteredModel, adapter: RegisteredModel, tmp_path: Path, tiny: TinyModel
) -> None:
    path = write_tiny_lora(tmp_path / "other.gguf", tiny.path, seed=1)
    with pytest.raises(ConflictError, match="tiny:1:legal already"):
        import_adapter(path, registry, base="tiny", name="legal")
    with pytest.raises(ConflictError, match="tiny:1:legal already"):
        registry.register(replace(adapter, files=(replace(adapter.files[0], sha256="e" * 64),)), "a test")
    assert registry.list() == [base, adapter]


def test_an_adapter_for_another_model_is_refused_and_nothing_is_kept(
    registry: Registry, base: RegisteredModel, tmp_path: Path
) -> None:
    wider = write_tiny_llama(tmp_path / "wider.gguf", embedding=64)
    path = write_tiny_lora(tmp_path / "lora.gguf", wider)
    with pytest.raises(ModelFileError, match="do not fit"):
        import_adapter(path, registry, base="tiny")
    assert registry.list() == [base]
    assert partial_names(registry) == []


def test_an_adapter_cannot_be_the_base_of_an_adapter(
    registry: Registry, adapter: RegisteredModel, lora: TinyModel
) -> None:
    with pytest.raises(InvalidRequestError, match="adapter itself") as refused:
        import_adapter(lora.path, registry, base="tiny:legal", name="more")
    assert "--base tiny:1" in refused.value.advice


def test_without_its_base_an_adapter_is_refused(registry: Registry, lora: TinyModel) -> None:
    with pytest.raises(NotFoundError, match="no model 'tiny'"):
        import_adapter(lora.path, registry, base="tiny", name="legal")
    assert_nothing_visible(registry)


def test_a_base_with_adapters_is_not_removed_and_the_refusal_says_what_to_do(
    registry: Registry, base: RegisteredModel, adapter: RegisteredModel
) -> None:
    with pytest.raises(ConflictError, match="base of 1 adapters: legal") as refused:
        registry.remove("tiny")
    assert "appliance models remove tiny:1:legal" in refused.value.advice
    assert registry.list() == [base, adapter]
    assert base.files[0].path.exists()
    assert registry.remove("tiny:legal") == (adapter, adapter.size)
    assert registry.remove("tiny")[0] == base
    assert_nothing_visible(registry)


def test_an_adapter_in_use_is_not_removed(registry: Registry, adapter: RegisteredModel, tmp_path: Path) -> None:
    with processes.holding(registry.blobs.folder.parent.parent, "tiny:legal") as holder:
        with pytest.raises(ConflictError, match=f"in use by process {holder.pid}"):
            registry.remove("tiny:legal")
        assert adapter in registry.list()
    registry.remove("tiny:legal")
    with pytest.raises(NotFoundError):
        registry.hold(adapter)


def test_an_adapter_that_loses_its_base_on_the_way_in_is_not_registered(
    registry: Registry, base: RegisteredModel, adapter: RegisteredModel
) -> None:
    with pytest.raises(NotFoundError, match="tiny:7 was removed meanwhile"):
        registry.register(replace(adapter, version="7"), "a test")
    assert registry.list() == [base, adapter]


def test_an_adapter_removed_by_two_is_removed_once(
    registry: Registry, adapter: RegisteredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.remove("tiny:legal")
    monkeypatch.setattr(registry, "resolve", lambda name: adapter)
    with pytest.raises(NotFoundError, match="someone else"):
        registry.remove("tiny:legal")


def test_verifying_finds_a_damaged_adapter(registry: Registry, adapter: RegisteredModel) -> None:
    assert [each.problem for each in verify(registry.list())] == ["", ""]
    path = adapter.files[0].path
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    problems = {each.model.full_name: bool(each.problem) for each in verify(registry.list())}
    assert problems == {"tiny:1": False, "tiny:1:legal": True}


def test_changes_leave_audit_rows(registry: Registry, adapter: RegisteredModel) -> None:
    registry.remove("tiny:legal")
    rows = registry._database.read(
        lambda connection: connection.execute("SELECT action, subject FROM audit ORDER BY id").fetchall()
    )
    assert [tuple(row) for row in rows][1:] == [("model.register", "tiny:1:legal"), ("model.remove", "tiny:1:legal")]


def lora_document(lora: TinyModel, **changes: object) -> dict[str, object]:
    file = {"role": "adapter", "name": "lora.gguf", "sha256": lora.sha256, "size": lora.size}
    sources = [{"kind": "file", "path": str(lora.path)}]
    return document(lora, kind="lora", adapter="legal", files=[{**file, "sources": sources}], **changes)


def test_an_adapter_is_pulled_by_its_manifest(registry: Registry, base: RegisteredModel, lora: TinyModel) -> None:
    manifest = parse_manifest(as_toml(lora_document(lora)), "a test")
    assert (manifest.full_name, manifest.base_name) == ("tiny:1:legal", "tiny:1")
    found = Catalog([replace(entry(lora), manifest=manifest)]).find("tiny:legal")
    installed = pull(found, registry, stall_timeout_s=5)
    assert registry.list() == [base, installed.model]
    assert (installed.model.full_name, installed.model.minimum_memory) == ("tiny:1:legal", 1_000_000)
    assert pull(found, registry, stall_timeout_s=5).was_present


def test_a_pulled_adapter_needs_its_base_and_must_fit_it(registry: Registry, lora: TinyModel, tmp_path: Path) -> None:
    found = replace(entry(lora), manifest=parse_manifest(as_toml(lora_document(lora)), "a test"))
    with pytest.raises(NotFoundError, match="'tiny:1'"):
        pull(found, registry, stall_timeout_s=5)
    assert_nothing_visible(registry)
    import_model(write_tiny_llama(tmp_path / "wider.gguf", embedding=64), registry, name="tiny")
    with pytest.raises(ModelFileError, match="do not fit"):
        pull(found, registry, stall_timeout_s=5)
    assert names(registry) == ["tiny:1"]
    assert partial_names(registry) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "gguf"},
        {"adapter": "Le gal"},
        {"defaults": {"context": 5}},
        {"files": [{"name": "a", "sha256": "0" * 64, "size": 1}]},
    ],
)
def test_a_manifest_that_mixes_models_and_adapters_is_refused(lora: TinyModel, changes: dict[str, object]) -> None:
    with pytest.raises(ModelFileError, match="manifest a test is wrong"):
        parse_manifest(as_toml(lora_document(lora) | changes), "a test")


def test_a_database_from_before_adapters_keeps_its_models(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        migrate(old, MIGRATIONS[:2])
        old.execute(
            "INSERT INTO models VALUES "
            "(7, 'old', '3', 'gguf', 'chat', 'MIT', 5, 'llama', 'F32', 512, 9, NULL, '[]', NULL)"
        )
        old.execute("INSERT INTO model_files VALUES (7, 'model', ?, 12)", ("a" * 64,))
    database = Database(path)
    try:
        migrated = Registry(database, registry.blobs)
        (model,) = migrated.list()
        assert (model.full_name, model.adapter, model.files[0].sha256) == ("old:3", "", "a" * 64)
        file = replace(model.files[0], role="adapter", sha256="b" * 64)
        migrated.register(replace(model, adapter="late", rank=1, files=(file,), kind="lora"), "a test")
        assert names(migrated) == ["old:3", "old:3:late"]
    finally:
        database.close()
