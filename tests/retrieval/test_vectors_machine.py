"""Any order of additions, removals, compactions, crashes and searches finds what plain arithmetic finds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.retrieval.vectors import VectorIndexes
from appliance.retrieval.vectors.policy import Limits
from tests.retrieval.test_vectors import Box
from tests.retrieval.truths import clustered

LIMITS = Limits(most_loose=20, most_delta=40, most_flat=10**6)
STORES = st.integers(1, 2)


class Machine(RuleBasedStateMachine):
    """The truth says what is to be found; the indexes may lag behind it only in files."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.box = Box(Path(self.folder.name), limits=LIMITS, memory_bytes=5000)

    @rule(store=STORES, count=st.integers(1, 60))
    def add(self, store: int, count: int) -> None:
        self.box.add(store, count)

    @rule(store=STORES, share=st.sampled_from([1, 2, 5]))
    def remove(self, store: int, share: int) -> None:
        self.box.remove(store, self.box.truth.ids(store)[::share])

    @rule(store=STORES, count=st.integers(1, 60))
    def add_without_telling(self, store: int, count: int) -> None:
        """The process was killed between the truth's commit and the index; it starts again."""
        ids = np.arange(self.box.last_id + 1, self.box.last_id + count + 1, dtype=np.int64)
        self.box.last_id += count
        self.box.truth.put(store, ids, clustered(count, seed=self.box.last_id))
        self.crash()

    @rule(store=STORES)
    def remove_without_telling(self, store: int) -> None:
        self.box.truth.take(self.box.truth.ids(store)[::3])
        self.crash()

    @rule()
    def crash(self) -> None:
        self.box.reopen()

    @rule(store=STORES, how=st.sampled_from([VectorIndexes.compact, VectorIndexes.erase, VectorIndexes.rebuild]))
    def renew(self, store: int, how: object) -> None:
        assert callable(how)
        how(self.box.indexes, store)

    @rule(store=STORES)
    def drop(self, store: int) -> None:
        self.box.truth.drop(store)
        self.box.indexes.drop(store)

    @rule(store=STORES, share=st.sampled_from([1, 3, 10]))
    def search_filtered(self, store: int, share: int) -> None:
        self.box.assert_exact(store, self.box.truth.ids(store)[::share], k=3)

    @invariant()
    def what_is_right_is_found(self) -> None:
        for store in (1, 2):
            self.box.assert_exact(store, k=3)
            assert self.box.indexes.verify(store) == []

    def teardown(self) -> None:
        self.box.indexes.close()
        self.box.truth.close()
        self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
