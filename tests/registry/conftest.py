"""A registry in a temporary data folder, and a tiny real model to put into it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.registry.blobs import Blobs
from appliance.registry.versions import Registry
from appliance.store.database import Database
from tests.registry.models import TinyModel
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", context_length=512)
    content = path.read_bytes()
    return TinyModel(path, content, hashlib.sha256(content).hexdigest())


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "data" / "models" / "blobs")


@pytest.fixture
def registry(tmp_path: Path, blobs: Blobs) -> Iterator[Registry]:
    database = Database(tmp_path / "data" / "appliance.db")
    yield Registry(database, blobs)
    database.close()
