"""The embedding cache: the same vectors as without it, sooner, and never a wrong one, whatever befalls its file."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.core.errors import EngineError, StorageError
from appliance.core.types import EmbeddingRequest, Embeddings, Vector
from appliance.observe.metrics import Metrics
from appliance.serving import embedding_cache
from appliance.serving.embedding_cache import EmbeddingCache
from appliance.serving.floor import ServingFloor
from appliance.store import database as database_module
from tests.serving.conftest import Box, serving
from tests.store.children import child, read_line
from tests.tiny_encoders import write_tiny_encoder

pytestmark = pytest.mark.anyio

# ruff: noqa: ASYNC240  (files of a test's own)

MODEL, SPACE = "any:1", b"space"
AMPLE = 64 * 1024 * 1024


def vector_of(tokens: Sequence[int], size: int = 8) -> Vector:
    """Return the one right vector for an input."""
    seed = hashlib.sha256(array("i", tokens).tobytes()).digest()
    return array("f", [each / 255 for each in (seed * (size // len(seed) + 1))[:size]])


class Engine:
    """Computes the right vectors, and remembers what it was asked for."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.asked: list[list[array[int]]] = []

    async def __call__(self, inputs: Sequence[array[int]]) -> Sequence[Vector]:
        self.asked.append(list(inputs))
        return [vector_of(each, self.size) for each in inputs]


def inputs_of(*numbers: int) -> list[array[int]]:
    return [array("i", [number, 7]) for number in numbers]


def on_disk(cache: EmbeddingCache) -> None:
    """Wait until what was kept is written."""
    assert cache._database is not None
    cache._database.write_blocking(lambda _: None)


async def ask(cache: EmbeddingCache, engine: Engine, *numbers: int, space: bytes = SPACE) -> None:
    """Embed and check that every vector is the right one, in order; then wait until it is written."""
    inputs = inputs_of(*numbers)
    vectors = await cache.embed(MODEL, space, inputs, engine)
    assert [each.tolist() for each in vectors] == [vector_of(each, engine.size).tolist() for each in inputs]
    if cache._database is not None:
        on_disk(cache)


async def hits(cache: EmbeddingCache, *numbers: int, size: int = 8) -> set[int]:
    """Return which inputs are there."""
    engine = Engine(size)
    vectors = await cache.embed(MODEL, SPACE, inputs_of(*numbers), engine)
    assert [each.tolist() for each in vectors] == [vector_of([number, 7], size).tolist() for number in numbers]
    return set(numbers) - {tokens[0] for asked in engine.asked for tokens in asked}


def metric(metrics: Metrics, name: str) -> int:
    lines = [line for line in metrics.render().decode().splitlines() if line.startswith(f"appliance_{name}{{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
def cache(path: Path) -> Iterator[EmbeddingCache]:
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as each:
        yield each


# What it answers


async def test_what_was_computed_is_found_and_in_order(cache: EmbeddingCache) -> None:
    engine = Engine()
    known = [number for number in range(512) if number % 3]
    await ask(cache, engine, *known)
    await ask(cache, engine, *reversed(range(512)))
    assert [len(each) for each in engine.asked] == [len(known), 512 - len(known)]
    await ask(cache, engine, *range(512))
    assert len(engine.asked) == 2


async def test_an_input_that_comes_twice_is_computed_once(cache: EmbeddingCache) -> None:
    engine = Engine()
    await ask(cache, engine, 1, 2, 1, 1, 2)
    assert engine.asked == [inputs_of(1, 2)]


async def test_spaces_do_not_mix(cache: EmbeddingCache) -> None:
    engine = Engine()
    await ask(cache, engine, 1, space=b"one")
    await ask(cache, engine, 1, space=b"other")
    assert len(engine.asked) == 2


def test_everything_that_makes_a_vector_is_in_the_key(cache: EmbeddingCache, box: Box) -> None:
    model = box.registry.resolve("tiny")
    [file] = model.files
    other_file = replace(model, files=(replace(file, sha256="0" * 64),))
    more_files = replace(model, files=(file, replace(file, role="1_Pooling/config.json")))
    other_order = replace(model, files=tuple(reversed(more_files.files)))
    spaces = [
        cache.space(model, "mean", ""),
        cache.space(model, "cls", ""),
        cache.space(model, "mean", "key_1"),
        cache.space(other_file, "mean", ""),
        cache.space(more_files, "mean", ""),
    ]
    assert len(set(spaces)) == len(spaces)
    assert cache.space(other_order, "mean", "") == cache.space(more_files, "mean", "")
    renamed = replace(model, name="same-file", version="9")
    assert cache.space(renamed, "mean", "") == spaces[0]
    inputs = [array("i", [1]), array("i", [1, 0]), array("i", [256])]
    assert len(set(cache.keys(SPACE, inputs))) == 3


async def test_what_fails_is_the_callers_and_nothing_is_kept(cache: EmbeddingCache) -> None:
    async def fail(_: Sequence[array[int]]) -> Sequence[Vector]:
        raise EngineError("Bad luck.")

    with pytest.raises(EngineError, match="Bad luck"):
        await cache.embed(MODEL, SPACE, inputs_of(1), fail)
    assert await hits(cache, 1) == set()


async def test_counts_are_true_to_what_was_asked_and_found(path: Path) -> None:
    metrics = Metrics()
    with closing(EmbeddingCache(path, AMPLE, metrics)) as cache:
        await ask(cache, Engine(), 1, 2)
        assert metric(metrics, "prompt_tokens_total") == 0, "the engine counts what it computes"
        await ask(cache, Engine(), 1, 2, 3)
        assert metric(metrics, "prompt_tokens_total") == 4
        assert metric(metrics, "request_success_total") == 0
        await ask(cache, Engine(), 3)
        assert metric(metrics, "request_success_total") == 1
    assert metric(metrics, "embedding_cache_queries_total") == 6
    assert metric(metrics, "embedding_cache_hits_total") == 3


# What stays


async def test_a_restart_finds_what_was_kept(path: Path) -> None:
    for expected in (set(), {1, 2, 3}):
        with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
            assert await hits(cache, 1, 2, 3) == expected


WRITE_WITHOUT_END = """
import asyncio, sys
from pathlib import Path
from appliance.observe.metrics import Metrics
from appliance.serving.embedding_cache import EmbeddingCache
from tests.serving.test_embedding_cache import Engine, MODEL, SPACE, inputs_of
async def main():
    cache = EmbeddingCache(Path(sys.argv[1]), int(sys.argv[2]), Metrics())
    number = int(sys.argv[3])
    while True:
        await cache.embed(MODEL, SPACE, inputs_of(*range(number, number + 20)), Engine(300))
        cache._database.submit(lambda _: None).result()  # behind the vectors: nobody else waits for their write
        number += 20
        print(number, flush=True)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_process_that_is_killed_leaves_no_wrong_vector(path: Path) -> None:
    most_bytes, number = 256 * 1024, 0
    for lines in (1, 3, 10, 40):
        with child(WRITE_WITHOUT_END, path, str(most_bytes), str(number)) as process:
            for _ in range(lines):
                number = int(read_line(process))
            process.kill()
        with closing(EmbeddingCache(path, 2 * most_bytes, Metrics())) as cache:
            found = await hits(cache, *range(number + 40), size=300)
            assert found
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_the_file_keeps_its_size_and_what_was_used_last(path: Path) -> None:
    most_bytes, engine = 400 * 1024, Engine(384)
    with closing(EmbeddingCache(path, most_bytes, Metrics())) as cache:
        for start in range(1, 2000, 20):
            await ask(cache, engine, 0, *range(start, start + 20))
        assert path.stat().st_size <= most_bytes
        found = await hits(cache, *range(2001), size=384)
    assert sum(len(each) for each in engine.asked) == 2001, "the one that was always used was computed once"
    assert 0 in found
    newest = found - {0}
    assert len(newest) > 60
    assert newest == set(range(min(newest), 2001))


async def test_uses_without_new_vectors_are_noted_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_cache, "TOUCHES", 3)

    def used(cache: EmbeddingCache) -> list[int]:
        assert cache._database is not None
        statement = "SELECT used FROM embeddings ORDER BY id"
        return cache._database.read(lambda connection: [row["used"] for row in connection.execute(statement)])

    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        await ask(cache, Engine(), 1, 2)
        for expected in ([1, 1], [1, 1], [2, 1]):
            await ask(cache, Engine(), 1)
            assert used(cache) == expected
        await ask(cache, Engine(), 2)
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        assert used(cache) == [2, 3], "closing notes the last uses"


async def test_a_request_larger_than_the_file_is_kept_in_part(path: Path) -> None:
    most_bytes = 128 * 1024
    with closing(EmbeddingCache(path, most_bytes, Metrics())) as cache:
        await ask(cache, Engine(384), *range(500))
        assert path.stat().st_size <= most_bytes
        assert await hits(cache, *range(500), size=384) == set(range(19))


async def test_a_size_that_holds_nothing_is_no_cache_and_no_failure(path: Path) -> None:
    with closing(EmbeddingCache(path, 10_000, Metrics())) as cache:
        await ask(cache, Engine(), 1)
        assert await hits(cache, 1) == set()


async def test_what_waits_for_a_slow_disk_is_bounded(cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_cache, "MOST_PENDING_BYTES", 3 * 8 * 4)
    await ask(cache, Engine(), 1, 2, 3, 4)
    assert await hits(cache, 1, 2, 3, 4) == {1, 2, 3}


async def test_a_size_of_0_deletes_the_file(path: Path) -> None:
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        await ask(cache, Engine(), 1)
    metrics = Metrics()
    with closing(EmbeddingCache(path, 0, metrics)) as cache:
        assert list(path.parent.iterdir()) == []
        assert await hits(cache, 1) == set()
        assert await cache.forget(cache.keys(SPACE, inputs_of(1))) == 0
        await cache.clear()
    assert metric(metrics, "embedding_cache_queries_total") == 0


async def test_a_smaller_size_makes_the_file_anew(path: Path) -> None:
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        await ask(cache, Engine(384), *range(200))
    with closing(EmbeddingCache(path, 100_000, Metrics())) as cache:
        assert path.stat().st_size < 100_000
        assert await hits(cache, *range(200), size=384) == set()


# What is forgotten


async def test_what_is_forgotten_is_gone_and_the_rest_is_not(cache: EmbeddingCache, path: Path) -> None:
    await ask(cache, Engine(), 1, 2, 3)
    assert await cache.forget(cache.keys(SPACE, inputs_of(2, 9))) == 1
    assert all(vector_of([2, 7]).tobytes() not in each.read_bytes() for each in path.parent.iterdir())
    assert vector_of([3, 7]).tobytes() in path.read_bytes()
    cache.close()
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as again:
        assert await hits(again, 1, 2, 3) == {1, 3}


async def test_clearing_leaves_an_empty_cache_that_works(cache: EmbeddingCache, path: Path) -> None:
    await ask(cache, Engine(), 1, 2)
    await cache.clear()
    assert all(vector_of([1, 7]).tobytes() not in each.read_bytes() for each in path.parent.iterdir())
    assert await hits(cache, 1, 2) == set()
    on_disk(cache)
    assert await hits(cache, 1, 2) == {1, 2}


# What goes wrong


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"no database " * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: sqlite3.connect(path).execute("UPDATE schema_migrations SET name = 'other'").connection.commit(),
        lambda path: path.write_bytes(path.read_bytes()[:4096] + bytes(range(256)) * 200),
    ],
    ids=["garbage", "torn", "another version", "damaged pages"],
)
async def test_a_file_that_cannot_be_used_is_made_anew(path: Path, spoil, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        await ask(cache, Engine(), *range(100))
    spoil(path)
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache, caplog.at_level(logging.WARNING):
        for _ in range(3):  # damage may be noticed by a look-up, or not before a write
            await ask(cache, Engine(), *range(100))
        assert await hits(cache, *range(100)) == set(range(100))


async def test_a_file_that_is_damaged_while_it_is_open_is_made_anew(
    cache: EmbeddingCache, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await ask(cache, Engine(), *range(200))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    assert cache._database is not None
    cache._database._idle_readers.clear()  # their page caches are whole still
    for _ in range(3):
        await ask(cache, Engine(), *range(200))
    assert await hits(cache, *range(200)) == set(range(200))
    assert "not cached" in caplog.text


async def test_a_flipped_bit_in_a_vector_is_a_miss(path: Path) -> None:
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        await ask(cache, Engine(), 1, 2)
    content = bytearray(path.read_bytes())
    at = content.index(vector_of([1, 7]).tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        assert await hits(cache, 1, 2) == {2}


async def test_a_full_disk_fails_no_request_and_is_said_once(
    cache: EmbeddingCache, caplog: pytest.LogCaptureFixture
) -> None:
    await ask(cache, Engine(), 1)
    assert cache._database is not None
    cache._database.write_blocking(lambda connection: connection.execute("PRAGMA max_page_count=1").fetchall())
    for number in range(2, 6):
        await ask(cache, Engine(4096), number)
    assert len(caplog.records) == 1
    cache._database.write_blocking(lambda connection: connection.execute("PRAGMA max_page_count=100000").fetchall())
    await ask(cache, Engine(), 6)
    assert await hits(cache, 1, 6) == {1, 6}


async def test_a_write_that_never_began_does_not_stop_those_after_it(
    cache: EmbeddingCache, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache._database is not None
    cache._database.write_blocking(lambda connection: connection.execute("PRAGMA busy_timeout=1").fetchall())
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await cache.embed(MODEL, SPACE, inputs_of(1), Engine())
        async with asyncio.timeout(10):
            while "locked" not in caplog.text:  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0)
        other.execute("ROLLBACK")
    await ask(cache, Engine(), 2)
    assert await hits(cache, 1, 2) == {1, 2}


async def test_a_mistake_of_ours_is_logged_and_fails_no_request(
    cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a mistake")

    monkeypatch.setattr(embedding_cache, "write_batch", fail)
    await ask(cache, Engine(), 1)
    async with asyncio.timeout(10):
        while "a mistake" not in caplog.text:  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0)


async def test_a_file_that_cannot_be_opened_means_no_cache(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir()
    (path / "file").touch()
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        await ask(cache, Engine(), 1)
        assert await hits(cache, 1) == set()
    assert "not cached" in caplog.text
    assert (path / "file").exists()


async def test_a_file_that_cannot_be_deleted_is_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.with_name("cache.db-wal").mkdir()
    with closing(EmbeddingCache(path, 0, Metrics())) as cache:
        await ask(cache, Engine(), 1)
    assert "cannot be deleted" in caplog.text


async def test_another_programs_file_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    with closing(EmbeddingCache(path, AMPLE, Metrics())) as cache:
        await ask(cache, Engine(), 1)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM bookmarks").fetchone() == (0,)
    assert "bookmarks" in caplog.text


async def test_a_file_that_cannot_be_made_anew_means_no_cache(
    cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Path) -> None:
        raise StorageError("It cannot be deleted.")

    monkeypatch.setattr(embedding_cache, "delete_cache", fail)
    cache._damaged = cache._database
    await ask(cache, Engine(), 1)
    await ask(cache, Engine(), 1)
    assert "cannot be deleted" in caplog.text
    assert cache._database is None


async def test_requests_at_once_make_a_damaged_file_anew_once(cache: EmbeddingCache) -> None:
    damaged = cache._database
    cache._damaged = damaged
    await asyncio.gather(*(cache.embed(MODEL, SPACE, inputs_of(number), Engine()) for number in range(5)))
    assert cache._database is not damaged
    await ask(cache, Engine(), *range(5))
    assert await hits(cache, *range(5)) == set(range(5))
    cache._damaged = damaged  # which was noticed late, by a read that began before
    renewed = cache._database
    assert await hits(cache, *range(5)) == set(range(5))
    assert cache._database is renewed


async def test_a_closed_cache_computes(cache: EmbeddingCache, caplog: pytest.LogCaptureFixture) -> None:
    await ask(cache, Engine(), 1)
    database = cache._database
    cache.close()
    cache.close()
    assert await hits(cache, 1) == set()
    cache._database = database  # a request that is on its way while the file closes
    vectors = await cache.embed(MODEL, SPACE, inputs_of(1), Engine())
    assert vectors[0].tolist() == vector_of([1, 7]).tolist()
    assert "closed" in caplog.text


async def test_a_disk_that_hangs_at_the_end_is_said(
    cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    monkeypatch.setattr(database_module, "CLOSE_TIMEOUT_S", 0.01)
    gate = threading.Event()
    assert cache._database is not None
    cache._database.submit(lambda _: gate.wait(10))
    cache.close()
    gate.set()
    assert "did not close" in caplog.text


# Behind a real engine


async def embed(floor: ServingFloor, model: str, *inputs: str, **more: object) -> Embeddings:
    return await floor.embedding.embed(EmbeddingRequest(model, inputs, **more))  # type: ignore[arg-type]


async def test_a_hit_needs_no_engine_and_differs_in_nothing(box: Box) -> None:
    box.add_encoder("encoder")
    box.add_encoder("other", seed=1)
    async with serving(box, embedding_cache_bytes=AMPLE, max_loaded_embedders=2) as floor:
        first = await embed(floor, "encoder", "the dog", "the quick brown fox")
        on_disk(floor.cache)
        async with floor.embedders.lease("encoder") as model:
            model.engine.config = replace(model.engine.config, queue_size=-1)  # it takes nothing any more
            assert model.engine.queue_full
            again = await embed(floor, "encoder", "the quick brown fox", "the dog")
        assert list(again.vectors) == list(reversed(first.vectors))
        assert again.token_counts == list(reversed(first.token_counts))
        assert (metric(floor.metrics, "prompt_tokens_total"), sum(first.token_counts)) == (20, 10)
        assert metric(floor.metrics, "request_success_total") == 2
        other = await embed(floor, "other", "the dog")
        assert other.vectors[0] != first.vectors[0]
        on_disk(floor.cache)
        assert metric(floor.metrics, "embedding_cache_hits_total") == 2
        stranger = await embed(floor, "other", "the dog", tenant="key_1")
        assert stranger.vectors[0] == pytest.approx(other.vectors[0], abs=0.005)
        assert metric(floor.metrics, "embedding_cache_hits_total") == 2


async def test_what_was_cut_is_said_on_a_hit_too(box: Box) -> None:
    box.add_encoder("encoder")
    async with serving(box, embedding_cache_bytes=AMPLE) as floor:
        for _ in range(2):
            told = await embed(floor, "encoder", "a", "a " * 200, truncate=True)
            assert list(told.truncated) == [1]
            assert list(told.token_counts) == [3, 128]
            on_disk(floor.cache)
        assert metric(floor.metrics, "embedding_cache_hits_total") == 2


async def test_prompt_tokens_over_onnx_are_counted_whether_computed_or_found(box: Box) -> None:
    box.add_onnx("vectors", write_tiny_encoder(box.folder / "vectors"))
    async with serving(box, embedding_cache_bytes=AMPLE) as floor:
        for asked in (1, 2):
            told = await embed(floor, "vectors", "the pump stops", "the valve leaks")
            on_disk(floor.cache)
            assert metric(floor.metrics, "prompt_tokens_total") == asked * sum(told.token_counts)
            assert metric(floor.metrics, "request_success_total") == asked


async def test_what_may_not_be_kept_is_not_and_what_is_here_is_used(cache: EmbeddingCache) -> None:
    await ask(cache, Engine(), 1)
    engine = Engine()
    await cache.embed(MODEL, SPACE, inputs_of(1, 2), engine, keep=False)
    assert engine.asked == [inputs_of(2)]
    on_disk(cache)
    assert await hits(cache, 1, 2) == {1}
