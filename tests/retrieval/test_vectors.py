from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from appliance.core.errors import ConflictError, InvalidRequestError, UnavailableError
from appliance.retrieval.vectors import VectorIndexes, indexes
from appliance.retrieval.vectors.generation import Generation
from appliance.retrieval.vectors.policy import Limits
from tests.retrieval.truths import DIMENSION, Floats, Ids, SqliteTruth, clustered, exact

SMALL = Limits(most_loose=100, most_delta=200, most_flat=1500, most_gathered=160)
"""All kinds of index with few vectors."""

QUERIES = clustered(12, seed=99)


class Box:
    """A truth, its indexes, and both kept in step as the room does it."""

    def __init__(self, folder: Path, memory_bytes: int = 2**28, limits: Limits = SMALL) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.limits = limits
        self.memory_bytes = memory_bytes
        self.truth = SqliteTruth(folder / "truth.db")
        self.indexes = VectorIndexes(folder / "vectors", self.truth, memory_bytes=memory_bytes, limits=limits)
        self.last_id = 0

    def reopen(self) -> None:
        self.indexes.close()
        self.indexes = VectorIndexes(
            self.folder / "vectors", self.truth, memory_bytes=self.memory_bytes, limits=self.limits
        )

    def add(self, store: int, count: int, seed: int | None = None, dimension: int = DIMENSION) -> Ids:
        ids = np.arange(self.last_id + 1, self.last_id + count + 1, dtype=np.int64)
        self.last_id += count
        vectors = clustered(count, dimension, seed=self.last_id if seed is None else seed)
        self.truth.put(store, ids, vectors)
        self.indexes.add(store, ids, vectors)
        return ids

    def remove(self, store: int, ids: Ids) -> None:
        self.truth.take(ids)
        self.indexes.remove(store, ids)

    def generation(self, store: int) -> Generation | None:
        snapshot = self.indexes._entries[store].snapshot
        assert snapshot is not None
        return snapshot.generation

    def kind(self, store: int) -> str:
        generation = self.generation(store)
        return generation.facts.kind if generation else "loose"

    def files(self, store: int) -> list[str]:
        folder = self.folder / "vectors" / str(store)
        return sorted(each.suffix for each in folder.iterdir()) if folder.exists() else []

    def assert_exact(self, store: int, allowed: Ids | None = None, k: int = 10) -> None:
        found = self.indexes.search(store, QUERIES, k, allowed)
        wanted = exact(self.truth, store, QUERIES, k, allowed)
        assert [[each for each, _ in row] for row in found] == [[each for each, _ in row] for row in wanted]
        for row, right in zip(found, wanted, strict=True):
            np.testing.assert_allclose([score for _, score in row], [score for _, score in right], atol=1e-5)


def recall(box: Box, store: int, allowed: Ids | None = None) -> float:
    found = box.indexes.search(store, QUERIES, 10, allowed)
    wanted = exact(box.truth, store, QUERIES, 10, allowed)
    pairs = zip(found, wanted, strict=True)
    return float(np.mean([len({i for i, _ in a} & {i for i, _ in b}) / len(b) for a, b in pairs]))


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.indexes.close()
    made.truth.close()


def test_an_empty_store_finds_nothing(box: Box) -> None:
    assert box.indexes.search(1, QUERIES, 10) == [[] for _ in QUERIES]
    assert box.indexes.verify(1) == []
    assert box.files(1) == []


@pytest.mark.parametrize(("count", "kind"), [(60, "loose"), (700, "flat")])
def test_the_nearest_are_found_with_their_cosines(box: Box, count: int, kind: str) -> None:
    for _ in range(0, count, 20):
        box.add(1, 20)
    assert box.kind(1) == kind
    box.assert_exact(1)
    box.assert_exact(1, k=1)
    box.assert_exact(1, k=5000)


def test_many_vectors_are_kept_in_lists_and_still_found(box: Box) -> None:
    box.add(1, 1600)
    box.add(1, 90)
    assert box.kind(1) == "ivf"
    assert recall(box, 1) >= 0.95


@pytest.mark.parametrize("count", [60, 700, 3000])
@pytest.mark.parametrize("share", [1, 2, 7, 50])
def test_a_filter_comes_before_the_search(box: Box, count: int, share: int) -> None:
    ids = box.add(1, count)
    box.add(1, 40)
    allowed = ids[::share]
    found = box.indexes.search(1, QUERIES, 10, allowed)
    assert all(len(row) == min(10, len(allowed)) for row in found), "as many as without a filter"
    assert {each for row in found for each, _ in row} <= set(allowed.tolist())
    assert recall(box, 1, allowed) >= (0.95 if box.kind(1) == "ivf" else 1.0)


def test_a_filter_may_name_what_the_store_does_not_have(box: Box) -> None:
    box.add(1, 300)
    box.assert_exact(1, np.array([-5, 3, 7, 8, 10**12], np.int64))
    box.assert_exact(1, np.arange(-1000, 1000, dtype=np.int64))
    box.assert_exact(1, np.empty(0, np.int64))
    box.assert_exact(1, np.array([10**9], np.int64))
    box.assert_exact(1, np.array([3, 3, 3, 9], np.int64))


def test_ids_far_apart_are_filtered_too(box: Box) -> None:
    ids = np.sort(np.random.default_rng(1).choice(10**12, 400, replace=False)).astype(np.int64)
    vectors = clustered(400)
    box.truth.put(1, ids, vectors)
    box.indexes.add(1, ids, vectors)
    box.assert_exact(1, ids[::2])


def test_chunks_may_get_their_vectors_out_of_order(box: Box) -> None:
    ids = np.random.default_rng(3).permutation(np.arange(1, 1001)).astype(np.int64)
    vectors = clustered(1000)
    for start in range(0, 1000, 50):
        part = slice(start, start + 50)
        box.truth.put(1, ids[part], vectors[part])
        box.indexes.add(1, ids[part], vectors[part])
    assert box.kind(1) == "flat"
    box.assert_exact(1)
    assert box.indexes.verify(1) == []


def test_lists_that_are_merged_out_of_order_hold_the_same_vectors(box: Box) -> None:
    odd, even = np.arange(1, 4001, 2, dtype=np.int64), np.arange(2, 402, 2, dtype=np.int64)
    for ids in (odd, even):
        box.truth.put(1, ids, clustered(len(ids), seed=len(ids)))
    box.truth.take(even)
    box.indexes.rebuild(1)
    before = box.generation(1)
    box.truth.put(1, even, clustered(200, seed=200))
    box.remove(1, odd[:300])
    box.indexes.compact(1)
    after = box.generation(1)
    assert before is not None
    assert after is not None
    assert (after.facts.kind, after.facts.trained_on, after.facts.count) == ("ivf", 2000, 1900)
    assert box.indexes.verify(1) == []
    everything = np.arange(1, 4001, dtype=np.int64)
    assert recall(box, 1) >= 0.95
    box.assert_exact(1, everything[::30])


def test_the_same_chunk_is_added_once(box: Box) -> None:
    ids = box.add(1, 50)
    vectors = box.truth.fetch(1, ids)[1]
    box.indexes.add(1, np.concatenate([ids, ids]), np.concatenate([vectors, vectors]))
    box.assert_exact(1, k=100)


def test_lengths_do_not_matter(box: Box) -> None:
    ids = np.array([1, 2], np.int64)
    vectors = np.array([[3, 0], [0, 0.001]], np.float32)
    box.truth.put(1, ids, vectors)
    box.indexes.add(1, ids, vectors)
    assert box.indexes.search(1, np.array([[0, 50]], np.float32), 1) == [[(2, 1.0)]]


def test_what_was_removed_is_not_found_from_then_on(box: Box) -> None:
    ids = box.add(1, 700)
    late = box.add(1, 30)
    gone = np.concatenate([ids[::3], late[::2]])
    box.remove(1, gone)
    box.assert_exact(1)
    box.assert_exact(1, ids[::2])
    box.remove(1, ids[1::3])
    box.assert_exact(1)
    box.reopen()
    box.assert_exact(1)
    assert box.indexes.verify(1) == []


def test_what_the_truth_lost_is_not_found_although_the_index_has_it(box: Box) -> None:
    ids = box.add(1, 700)
    box.truth.take(ids[::2])
    box.indexes.search(1, QUERIES, 10)
    found = box.indexes.search(1, QUERIES, 10)
    assert not {each for row in found for each, _ in row} & set(ids[::2].tolist())


@pytest.mark.parametrize("count", [700, 3000])
def test_erasing_leaves_no_code_of_what_was_removed_in_any_file(box: Box, count: int) -> None:
    ids = box.add(1, count)
    generation = box.generation(1)
    assert generation is not None
    gone = ids[::5]
    codes = [row.tobytes() for row in generation.codes(np.searchsorted(generation.ids, gone))]
    box.remove(1, gone)
    (file,) = (box.folder / "vectors" / "1").glob("*.vectors")
    assert all(code in file.read_bytes() for code in codes), "else this test proves nothing"
    del generation

    box.indexes.erase(1)

    assert not file.exists()
    assert box.files(1) == [".json", ".vectors"]
    content = b"".join(path.read_bytes() for path in (box.folder / "vectors").rglob("*") if path.is_file())
    assert [code for code in codes if code in content] == []
    assert box.indexes.verify(1) == []


def test_erasing_also_reaches_a_closed_store(box: Box) -> None:
    ids = box.add(1, 700)
    box.reopen()
    box.remove(1, ids[:100])
    box.indexes.erase(1)
    generation = box.generation(1)
    assert generation is not None
    assert generation.facts.count == 600
    box.assert_exact(1)


def test_erasing_writes_nothing_where_nothing_was_removed(box: Box) -> None:
    box.add(1, 700)
    before = box.generation(1)
    box.indexes.erase(1)
    assert box.generation(1) is before


def test_a_store_that_shrinks_loses_its_files(box: Box) -> None:
    ids = box.add(1, 700)
    box.remove(1, ids[20:])
    box.indexes.compact(1)
    assert (box.kind(1), box.files(1)) == ("loose", [])
    box.assert_exact(1)


def test_a_dropped_store_is_gone_with_its_files(box: Box) -> None:
    box.add(1, 700)
    box.add(2, 700)
    box.truth.drop(1)
    box.indexes.drop(1)
    assert box.indexes.search(1, QUERIES, 10) == [[] for _ in QUERIES]
    assert (box.files(1), box.files(2)) == ([], [".json", ".vectors"])
    box.assert_exact(2)
    box.indexes.drop(1)


def test_another_dimension_is_refused_with_advice_and_nothing_changes(box: Box) -> None:
    box.add(1, 700)
    ids = np.array([10_000], np.int64)
    with pytest.raises(ConflictError, match=r"16 dimensions, and these have 8.*embed it anew") as caught:
        box.indexes.add(1, ids, np.ones((1, 8), np.float32))
    assert caught.value.code == "dimension_changed"
    with pytest.raises(ConflictError, match="dimensions"):
        box.indexes.search(1, np.ones((1, 8), np.float32), 10)
    box.assert_exact(1)


def test_a_store_that_was_embedded_anew_is_made_anew(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    ids = box.add(1, 700)
    vectors = clustered(700, 8, seed=4)
    box.truth.put(1, ids, vectors)
    box.truth.name_model(1, "model:2")
    with pytest.raises(ConflictError, match="dimensions"):
        box.indexes.search(1, QUERIES, 10)
    box.indexes.rebuild(1)
    assert box.indexes.search(1, vectors[:1], 1)[0][0][0] == ids[0]


def test_another_embedder_of_the_same_dimension_is_noticed_at_the_next_start(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    ids = box.add(1, 700)
    box.truth.put(1, ids, clustered(700, seed=5))
    box.truth.name_model(1, "model:2")
    box.reopen()
    with caplog.at_level(logging.WARNING):
        box.assert_exact(1)
    assert "it is of model:1, the vectors of model:2" in caplog.text
    assert box.indexes.verify(1) == []


@pytest.mark.parametrize(
    "bad", [np.array([[np.nan] * DIMENSION]), np.array([[np.inf] * DIMENSION]), np.ones(DIMENSION)]
)
def test_what_is_no_vector_is_refused(box: Box, bad: Floats) -> None:
    with pytest.raises(InvalidRequestError, match="finite"):
        box.indexes.search(1, bad.astype(np.float32), 10)
    with pytest.raises(InvalidRequestError, match="finite"):
        box.indexes.add(1, np.array([1], np.int64), bad.astype(np.float32))


def test_ids_and_vectors_come_in_equal_numbers(box: Box) -> None:
    with pytest.raises(ValueError, match="2 ids for 1 vectors"):
        box.indexes.add(1, np.array([1, 2], np.int64), np.ones((1, 4), np.float32))


def test_the_longest_unused_store_is_closed_and_comes_back(tmp_path: Path) -> None:
    box = Box(tmp_path, memory_bytes=60_000)
    for store in (1, 2, 3):
        box.add(store, 700)
    held = {store for store, entry in box.indexes._entries.items() if entry.snapshot is not None}
    assert held == {2, 3}
    assert box.indexes.open_bytes <= 60_000
    box.assert_exact(1)
    held = {store for store, entry in box.indexes._entries.items() if entry.snapshot is not None}
    assert held == {1, 3}
    box.add(2, 20)
    box.assert_exact(2)
    box.indexes.close()
    box.truth.close()


def test_one_store_larger_than_the_cap_is_searched_alone(tmp_path: Path) -> None:
    box = Box(tmp_path, memory_bytes=1)
    for store in (1, 2):
        box.add(store, 700)
    for store in (1, 2, 1):
        box.assert_exact(store)
        held = [number for number, entry in box.indexes._entries.items() if entry.snapshot is not None]
        assert held == [store]
    box.indexes.close()
    box.truth.close()


def test_a_folder_belongs_to_one_process(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "_LOCK_WAIT_S", 0.01)
    with pytest.raises(ConflictError, match="Another process"):
        VectorIndexes(box.folder / "vectors", box.truth, memory_bytes=1)


def test_a_search_does_not_wait_for_ever_for_an_index_that_is_made_anew(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexes, "_SEARCH_WAIT_S", 0.01)
    with box.indexes._entry(1).remaking, pytest.raises(UnavailableError, match="keyword") as caught:
        box.indexes.search(1, QUERIES, 10)
    assert caught.value.retry_after_s


def test_closed_indexes_say_so(box: Box) -> None:
    box.add(1, 20)
    box.indexes.close()
    box.indexes.close()
    with pytest.raises(UnavailableError, match="closed"):
        box.indexes.search(1, QUERIES, 10)


def test_verification_sees_codes_that_are_not_the_vectors(box: Box) -> None:
    ids = box.add(1, 700)
    box.truth.put(1, ids, clustered(700, seed=1234))
    assert "sampled codes are wrong" in box.indexes.verify(1)[0]


def test_verification_sees_chunks_that_are_not_found(box: Box) -> None:
    box.add(1, 50)
    box.truth.put(1, np.array([900], np.int64), clustered(1))
    assert box.indexes.verify(1) == ["The index of store 1 finds 50 of 51 chunks."]
