"""Searches, additions, removals and compactions at once, each from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.test_vectors import QUERIES, Box, recall

DEADLINE_S = 60


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.indexes.close()
    made.truth.close()


def run_beside(work: Callable[[], None], *others: Callable[[], None]) -> None:
    """Repeat the others, each on a thread, until the work is done; any failure is raised."""
    is_done = threading.Event()
    deadline = time.monotonic() + DEADLINE_S

    def repeat(other: Callable[[], None]) -> int:
        rounds = 0
        while not is_done.is_set() and time.monotonic() < deadline:
            other()
            rounds += 1
        return rounds

    with ThreadPoolExecutor(len(others)) as pool:
        running = [pool.submit(repeat, other) for other in others]
        try:
            work()
        finally:
            is_done.set()
        assert all(each.result(DEADLINE_S) for each in running), "each had a turn"


@pytest.mark.parametrize("count", [300, 2500])
def test_searches_see_whole_states_during_changes(box: Box, count: int) -> None:
    first = box.add(1, count)
    stays, gone = set(first[::2].tolist()), first[1::2]
    removed: set[int] = set()

    def search() -> None:
        certainly_removed = set(removed)
        for row in box.indexes.search(1, QUERIES[:2], 10):
            assert len(row) == 10
            assert not {each for each, _ in row} & certainly_removed

    def compact() -> None:
        box.indexes.compact(1)

    def filtered() -> None:
        allowed = np.array(sorted(stays), np.int64)
        for row in box.indexes.search(1, QUERIES[2:4], 10, allowed):
            assert len(row) == 10
            assert {each for each, _ in row} <= stays

    def change() -> None:
        for start in range(0, len(gone), 40):
            part = gone[start : start + 40]
            box.remove(1, part)
            removed.update(part.tolist())
            added = box.add(1, 30)
            newest = box.truth.fetch(1, added[-1:])[1]
            assert added[-1] in [each for each, _ in box.indexes.search(1, newest, 3)[0]], "found at once"

    run_beside(change, search, search, filtered, compact)
    assert box.indexes.verify(1) == []
    assert recall(box, 1) >= 0.95
    box.indexes.erase(1)
    assert box.indexes.verify(1) == []


def test_two_stores_are_dropped_while_they_are_searched(box: Box) -> None:
    for store in (1, 2, 3):
        box.add(store, 600)

    def search(store: int) -> Callable[[], None]:
        def once() -> None:
            assert all(len(row) <= 10 for row in box.indexes.search(store, QUERIES, 10))

        return once

    def drop() -> None:
        for store in (1, 2):
            box.truth.drop(store)
            box.indexes.drop(store)
            assert box.indexes.search(store, QUERIES, 10) == [[] for _ in QUERIES]

    run_beside(drop, search(1), search(2), search(3), lambda: box.indexes.compact(1))
    assert (box.files(1), box.files(2)) == ([], [])
    box.assert_exact(3)


def test_a_store_dropped_while_it_is_made_anew_leaves_no_file(box: Box) -> None:
    box.add(1, 2500)

    def drop() -> None:
        box.truth.drop(1)
        box.indexes.drop(1)

    run_beside(drop, lambda: box.indexes.rebuild(1), lambda: box.indexes.rebuild(1))
    assert box.files(1) == []


def test_stores_are_opened_and_closed_under_the_cap_by_many_threads(tmp_path: Path) -> None:
    box = Box(tmp_path, memory_bytes=50_000)
    for store in range(1, 6):
        box.add(store, 400)
    wanted = {store: box.indexes.search(store, QUERIES, 10) for store in range(1, 6)}

    def search(seed: int) -> Callable[[], None]:
        random = np.random.default_rng(seed)

        def once() -> None:
            store = int(random.integers(1, 6))
            assert box.indexes.search(store, QUERIES, 10) == wanted[store]

        return once

    def add() -> None:
        for _ in range(40):
            box.add(6, 10)

    run_beside(add, *(search(seed) for seed in range(4)))
    box.assert_exact(6)
    box.indexes.close()
    box.truth.close()
