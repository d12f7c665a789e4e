"""all-MiniLM-L6-v2 in 32 bits, quantised as a user would do it: small, and still near what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from appliance.registry.layout import lay_out
from appliance.registry.roles import MODEL
from appliance.registry.versions import open_registry
from appliance.store.database import Database
from tests.engine.test_encoder_quality import SENTENCES
from tests.journeys.processes import appliance
from tests.tiny_encoders import MINILM, read_safetensors, write_bert

pytestmark = [pytest.mark.journey, pytest.mark.slow]


@pytest.fixture
def exact_data(real_data: Path, tmp_path: Path) -> Path:
    """Return a data folder with the model `exact`: the catalog's files around a graph of the original weights."""
    database = Database(real_data / "appliance.db", read_only=True)
    registry = open_registry(Settings(data_dir=real_data), database)
    weights = registry.resolve("all-minilm-l6-v2-weights").file("model.safetensors")
    assert weights is not None
    folder = tmp_path / "exact"
    shutil.copytree(lay_out(registry.resolve("all-minilm-l6-v2"), tmp_path / "onnx"), folder)
    database.close()
    graph = folder / "model.onnx"
    graph.unlink()
    write_bert(graph, read_safetensors(weights.path), MINILM)
    data = tmp_path / "data"
    done = appliance("models", "import", str(folder), "--licence", "Apache-2.0", data=data)
    assert done.returncode == 0, done.stderr
    return data


def test_minilm_is_a_quarter_of_its_size_and_its_vectors_point_the_same_way(exact_data: Path, tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n".join(SENTENCES), encoding="utf-8")
    done = appliance("models", "quantize", "exact", "--samples", str(sentences), "--json", data=exact_data)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"] == "exact-int8:1"
    comparison = report["comparison"]
    assert comparison["quantised"]["bytes"] < 0.3 * comparison["original"]["bytes"]
    (embedding,) = comparison["outputs"]
    assert embedding["cosine_mean"] >= 0.98
    shown = appliance("models", "show", "exact-int8", "--json", data=exact_data)
    assert {each["role"] for each in json.loads(shown.stdout)["files"]} >= {MODEL, "tokenizer.json", "config.json"}
