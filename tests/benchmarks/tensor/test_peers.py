"""Each contestant taken through the workloads with a tiny encoder; its speed proves nothing and is not looked at."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from appliance.registry.install import import_model
from appliance.registry.install_onnx import import_onnx
from appliance.registry.versions import open_registry
from appliance.store.database import Database
from tests.benchmarks.peers import program_of
from tests.benchmarks.results import compare, table_of
from tests.benchmarks.tensor.__main__ import registered_models
from tests.benchmarks.tensor.models import DERIVED, ENCODER, Models, Tokens
from tests.benchmarks.tensor.peers import MLSERVER, PEERS, RAW, STOCK, Appliance, MLServer, Peer, RawSession, peers
from tests.benchmarks.tensor.suite import WORKLOADS
from tests.benchmarks.tensor.workload import QUICK, Corpus, Trial
from tests.tiny_encoders import write_tiny_encoder
from tests.tiny_gguf import write_tiny_llama

TINY = dataclasses.replace(
    QUICK,
    clients=2,
    warm_s=0.05,
    steady_s=0.2,
    raw_s=0.0,
    payloads=1,
    binary_mb=1,
    json_elements=100,
    singles=5,
    streamed=400,
)
"""Too little to measure anything."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder that has tiny models under the names of the real ones."""
    folder = tmp_path_factory.mktemp("tensors")
    settings = Settings(data_dir=folder / "data")
    with closing(Database(settings.database_path)) as database:
        registry = open_registry(settings, database)
        (folder / "encoder").mkdir()
        import_onnx(write_tiny_encoder(folder / "encoder"), registry, name=ENCODER, licence="MIT")
        llama = write_tiny_llama(folder / "chat.gguf", context_length=8192)
        import_model(llama, registry, name=settings.model, licence="MIT")
    return settings.data_dir


@pytest.fixture(scope="module")
def models(data: Path) -> Models:
    return registered_models(data)


def peer(name: str, models: Models, data: Path) -> Peer:
    """Return a contestant, or skip the test where it is not built."""
    if name == MLSERVER and not program_of(MLSERVER, build=False).exists():
        pytest.skip("mlserver is not built: tests/benchmarks/build_peer mlserver does so")
    return peers(models, data, [name] if name in PEERS else [], 1, build=False)[-1]


def corpus(models: Models) -> Corpus:
    """Return texts that are short even in the tiny encoder's tokens, which are letters."""
    made = Corpus(0, TINY, Tokens(models.tokenizer))
    made.__dict__["sentences"] = ["the pump stops", "the night shift checks a valve"]
    made.__dict__["passages"] = [*made.sentences, "a camera"]
    return made


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("contestant", ["appliance", *PEERS])
async def test_a_workload_measures_what_it_promises(name: str, contestant: str, models: Models, data: Path) -> None:
    workload, subject = WORKLOADS[name], peer(contestant, models, data)
    if not workload.contestants([subject]):
        pytest.skip(f"{contestant} takes no part")
    sample = await workload.measure(Trial(subject, corpus(models)))
    assert all(value > 0 for value in sample.values.values())
    if isinstance(subject, Appliance):
        assert sample.values.keys() == {each.measured for each in workload.quantities}
    headings, rows = table_of(compare(workload, {subject.name: [sample]}))
    assert rows
    assert all(len(row) == len(headings) for row in rows)


@pytest.mark.slow
def test_models_that_were_imported_before_are_not_imported_again(models: Models, data: Path) -> None:
    assert registered_models(data) == models
    with closing(Database(data / "appliance.db")) as database:
        registered = open_registry(Settings(data_dir=data), database).list()
    assert [each.version for each in registered if each.name in DERIVED] == ["1"] * len(DERIVED)


def test_mlserver_is_tried_with_all_threads_in_one_evaluation_and_with_one_in_each() -> None:
    subject = MLServer(Models(Path(), Path(), Path()), 2, Path("mlserver"))
    found = {dataclasses.replace(subject, tuning=each).session_threads * each.lanes for each in subject.candidates}
    assert found == {2}
    assert len(set(subject.candidates)) == 12
    assert str(subject.candidates[0]) == "parallel_workers 0, no batches of encoders, 1 evaluations at once"


def test_mlserver_as_it_comes_is_measured_beside_the_one_that_is_tuned_where_sentences_are() -> None:
    files = Models(Path(), Path(), Path())
    found = peers(files, Path(), [RAW], 2, build=False)
    tuned = MLServer(files, 2, Path("mlserver"))
    names = [each.name for each in WORKLOADS["sentences"].contestants([*found, tuned])]
    assert names == ["appliance", RAW, MLSERVER, STOCK]
    assert tuned.as_it_comes().about == (
        "mlserver start; parallel_workers 1, no batches of encoders, 1 evaluations at once, 2 threads each; debug off"
    )
    assert STOCK not in [each.name for each in WORKLOADS["json"].contestants([*found, tuned])]
    promised = {(each.baseline, each.target) for each in WORKLOADS["sentences"].quantities if "/v1" in each.name}
    assert promised == {("", 0.85), (STOCK, 2.0), (MLSERVER, None), (STOCK, 1.0), (MLSERVER, 1.0)}


def test_everyone_says_how_it_is_run() -> None:
    files = Models(Path(), Path(), Path())
    subjects: list[Peer] = [Appliance(files, 2, Path()), RawSession(files, 2), MLServer(files, 2, Path("mlserver"))]
    assert all("2" in each.about for each in subjects)
