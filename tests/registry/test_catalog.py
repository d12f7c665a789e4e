from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from appliance.core.errors import ModelFileError, NotFoundError, SettingsError
from appliance.core.settings import Settings
from appliance.registry.catalog import BUILT_IN_FOLDER, open_catalog, version_order
from appliance.registry.manifest import WheelSource
from tests.registry.models import TinyModel, document, write_manifest

REPOSITORY = Path(__file__).parents[2]


def test_the_built_in_models_are_those_of_the_top_folder() -> None:
    built_in = {each.name for each in BUILT_IN_FOLDER.glob("*.toml")}
    assert "smollm2-135m-instruct.toml" in built_in
    assert built_in == {each.name for each in (REPOSITORY / "models").glob("*.toml")}


def test_the_default_model_of_the_settings_can_be_pulled() -> None:
    assert open_catalog(Settings()).find(Settings().model).manifest.task == "chat"


def test_the_default_embedding_model_comes_with_its_tokenizer_out_of_an_archive_in_a_wheel() -> None:
    manifest = open_catalog(Settings()).find("all-minilm-l6-v2").manifest
    assert (manifest.kind, manifest.task, manifest.licence) == ("onnx", "embedding", "Apache-2.0")
    tokenizer = next(each for each in manifest.files if each.role == "tokenizer.json")
    (source,) = tokenizer.sources
    assert isinstance(source, WheelSource)
    assert (source.inside, source.member) == ("all_minilm_l6_v2/model.zip", "tokenizer.json")


def test_models_that_see_and_hear_can_be_pulled() -> None:
    catalog = open_catalog(Settings())
    for name in ("silero-vad", "pp-ocrv6-det-small", "pp-ocrv6-rec-small", "pp-ocr-cls-mobile"):
        assert catalog.find(name).manifest.task == "tensor"


def test_a_site_adds_models_of_its_own(tmp_path: Path, tiny: TinyModel) -> None:
    write_manifest(tmp_path / "site", document(tiny))
    catalog = open_catalog(Settings(catalog_dir=tmp_path / "site"))
    assert catalog.find("tiny").folder == tmp_path / "site"
    assert catalog.find("smollm2-135m-instruct").folder == BUILT_IN_FOLDER


def test_a_site_replaces_a_built_in_model_to_name_other_sources(tmp_path: Path, tiny: TinyModel) -> None:
    write_manifest(tmp_path / "site", document(tiny, name="smollm2-135m-instruct", version="1"))
    entries = open_catalog(Settings(catalog_dir=tmp_path / "site")).entries
    found = [each for each in entries if each.manifest.name == "smollm2-135m-instruct"]
    assert [each.folder for each in found] == [tmp_path / "site"]


def test_a_name_without_version_is_the_highest_version(tmp_path: Path, tiny: TinyModel) -> None:
    for version in ("9", "10", "1.0"):
        write_manifest(tmp_path / "site", document(tiny, version=version))
    catalog = open_catalog(Settings(catalog_dir=tmp_path / "site"))
    assert catalog.find("tiny").manifest.version == "10"
    assert catalog.find("tiny:9").manifest.version == "9"


def test_versions_are_ordered_as_people_count() -> None:
    ordered = ["1", "1.0", "1.0.1", "1.2", "1.10", "2-rc1", "9", "10"]
    assert sorted({*ordered}, key=version_order) == ordered


def test_an_unknown_model_is_answered_with_those_there_are() -> None:
    with pytest.raises(NotFoundError, match="smollm2-135m-instruct:1") as refused:
        open_catalog(Settings()).find("gpt-7")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_two_manifests_of_one_model_are_refused(tmp_path: Path, tiny: TinyModel) -> None:
    first = write_manifest(tmp_path / "site", document(tiny))
    shutil.copy(first, first.with_name("again.toml"))
    with pytest.raises(ModelFileError, match=r"again\.toml and .*tiny-1\.toml|tiny-1\.toml and .*again\.toml"):
        open_catalog(Settings(catalog_dir=tmp_path / "site"))


def test_a_wrong_manifest_of_the_site_is_named_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = 7")
    with pytest.raises(ModelFileError, match=r"broken\.toml"):
        open_catalog(Settings(catalog_dir=tmp_path))


def test_a_catalog_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        open_catalog(Settings(catalog_dir=tmp_path / "missing"))
    assert refused.value.param == "catalog_dir"


@pytest.mark.slow
def test_a_built_wheel_carries_the_manifests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("appliance", "models"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, "zip")
    print_names = (
        "from appliance.core.settings import Settings\n"
        "from appliance.registry.catalog import open_catalog\n"
        "print(*(each.manifest.full_name for each in open_catalog(Settings()).entries))"
    )
    done = subprocess.run(
        [sys.executable, "-c", print_names],
        env={"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    manifests = [tomllib.loads(each.read_text(encoding="utf-8")) for each in (REPOSITORY / "models").glob("*.toml")]
    assert done.stdout.split() == sorted(f"{each['name']}:{each['version']}" for each in manifests)
