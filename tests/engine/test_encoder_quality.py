"""all-MiniLM-L6-v2 against an independent forward pass over the original weights, pooled as sentence-transformers does.

The graph of the catalog keeps its weights in 8 bits and computes in 32, so the company of a text changes nothing there
either. A graph whose activations are quantised as they come would scale them by the largest of a whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from appliance.registry.blobs import Blobs
from appliance.registry.layout import lay_out
from appliance.registry.versions import Registry
from appliance.store.database import Database
from tests.engine.text_encoders import encoding, vectors
from tests.tiny_encoders import MINILM, Weights, mean_vector, read_safetensors, write_bert

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.journey]

SUBJECTS = [
    ("The pump of line 7", "七号线的水泵"),
    ("A forklift driver", "一名叉车司机"),
    ("Our oldest supplier", "我们最老的供应商"),
    ("The night shift", "夜班"),
    ("An unsigned firmware update", "没有签名的固件更新"),
    ("The camera above gate 3", "三号门上方的摄像头"),
    ("Grandmother's apple cake", "外婆的苹果蛋糕"),
    ("The court in Hamburg", "汉堡的法院"),
]
ENDS = [
    ("leaks when it rains.", "下雨时漏水。"),
    ("was cheaper than anybody had expected!", "比任何人预期的都便宜！"),
    ("has not answered since Tuesday, 14:30 UTC.", "从星期二14:30起就没有回应。"),
    ("needs 3.5 bar and 40 °C; why?", "需要3.5巴和40°C，为什么？"),
    ("reminds me of a song about the sea", "让我想起一首关于大海的歌"),
    ("is explained in §4 of the handbook (page 112).", "在手册第四节（第112页）中有说明。"),
]
ODD = [
    "a",
    "?",
    "1234567890" * 8,
    "naïve café Ærøskøbing",
    "🙂🚲",
    "def f(x): return x**2",
    "UPPER CASE",
    " spaced   out ",
]
SENTENCES = [
    f"{subject[way]}{' ' if way == 0 else ''}{end[way]}" for subject in SUBJECTS for end in ENDS for way in (0, 1)
]
LONG = [" ".join(SENTENCES[start::7]) for start in (0, 3)] + ["".join(SENTENCES[1::2]), "word " * 2000]
TEXTS = [*SENTENCES, *ODD, *LONG]


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    data = os.environ.get("APPLIANCE_TEST_MODEL_DATA")
    if data is None:
        pytest.skip("APPLIANCE_TEST_MODEL_DATA is not set: tests/check pulls the models and sets it")
    database = Database(Path(data) / "appliance.db")
    yield Registry(database, Blobs(Path(data) / "models" / "blobs"))
    database.close()


@pytest.fixture(scope="module")
def folder(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the catalog's model, as the product lays it out."""
    return lay_out(registry.resolve("all-minilm-l6-v2"), tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def weights(registry: Registry) -> Weights:
    file = registry.resolve("all-minilm-l6-v2-weights").file("model.safetensors")
    assert file is not None
    return read_safetensors(file.path)


@pytest.fixture(scope="module")
def exact_graph(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("graph") / "model.onnx", weights, MINILM)


@pytest.fixture(scope="module")
async def reference(folder: Path, weights: Weights) -> npt.NDArray[np.float32]:
    async with encoding(folder) as encoder:
        tokens, _ = await encoder.tokenize(TEXTS, truncate=True)
    return np.array([mean_vector(weights, MINILM, each) for each in tokens])


def test_there_are_texts_of_every_kind() -> None:
    assert len(set(TEXTS)) == len(TEXTS) >= 100


async def test_a_text_gets_the_tokens_of_the_published_model(folder: Path) -> None:
    """The ids are those that Hugging Face's tokenizer gives for these words."""
    async with encoding(folder) as encoder:
        assert (encoder.longest_input, encoder.dimensions, encoder.pooling) == (256, 384, "mean")
        found, _ = await encoder.tokenize(["Hello, world!", "naïve"], truncate=False)
    assert [each.tolist() for each in found] == [[101, 7592, 1010, 2088, 999, 102], [101, 15743, 102]]


async def test_a_graph_in_32_bits_gives_the_reference(
    folder: Path, exact_graph: Path, reference: npt.NDArray[np.float32]
) -> None:
    async with encoding(folder, graph=exact_graph) as encoder:
        found = await vectors(encoder, TEXTS, truncate=True)
    cosines = (found * reference).sum(axis=1)
    assert cosines.min() >= 0.999, [TEXTS[each] for each in np.argsort(cosines)[:3]]


async def test_the_model_of_the_catalog_is_near_the_reference(folder: Path, reference: npt.NDArray[np.float32]) -> None:
    async with encoding(folder) as encoder:
        together = await vectors(encoder, TEXTS, truncate=True)
        alone = np.concatenate([await vectors(encoder, [each], truncate=True) for each in TEXTS])
    assert (together * reference).sum(axis=1).mean() >= 0.98
    assert np.abs(together - alone).max() <= 1e-4


async def test_company_changes_no_vector_in_32_bits(folder: Path, exact_graph: Path) -> None:
    async with encoding(folder, graph=exact_graph) as encoder:
        together = await vectors(encoder, TEXTS, truncate=True)
        alone = np.concatenate([await vectors(encoder, [each], truncate=True) for each in TEXTS])
    assert np.abs(together - alone).max() <= 1e-4


async def test_what_means_the_same_is_near(folder: Path) -> None:
    pairs = [
        ("How do I reset my password?", "I forgot my login and want a new one."),
        ("The pump is leaking oil.", "Oil drips out of the pump."),
        ("Which bread is without gluten?", "Gluten-free loaves"),
    ]
    async with encoding(folder) as encoder:
        first = await vectors(encoder, [each for each, _ in pairs])
        second = await vectors(encoder, [each for _, each in pairs])
    assert (first @ second.T).argmax(axis=1).tolist() == [0, 1, 2]
