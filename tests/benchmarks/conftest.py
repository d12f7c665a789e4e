"""A tiny model that every peer can serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from appliance.engine.llama.model import LlamaModel
from appliance.registry.install import import_model
from appliance.registry.versions import open_registry
from appliance.store.database import Database
from tests.benchmarks.peers import Model
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    path = write_tiny_llama(tmp_path_factory.mktemp("models") / "roomy.gguf", context_length=8192)
    return LlamaModel(path, gpu_layers=0)


@pytest.fixture(scope="session")
def count(vocabulary: LlamaModel) -> Callable[[str], int]:
    return lambda text: len(vocabulary.tokenize(text, add_special=False, parse_special=False))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, vocabulary: LlamaModel) -> Model:
    folder = tmp_path_factory.mktemp("benchmarks")
    path = write_tiny_llama(folder / "roomy.gguf", context_length=8192)
    settings = Settings(data_dir=folder / "data")
    settings.data_dir.mkdir()
    database = Database(settings.database_path)
    registered = import_model(path, open_registry(settings, database), name="tiny", licence="MIT").model
    database.close()
    return Model(registered, settings.data_dir, tuple(vocabulary.end_tokens), threads=1)


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let servers work in a folder of the test instead of the cache, where the peers stay."""
    monkeypatch.setattr("tests.benchmarks.peers.cache_folder", lambda: tmp_path)
    return tmp_path
