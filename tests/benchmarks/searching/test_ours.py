"""Our contestant in the end: a small corpus is built, searched and right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.searching import searches
from tests.benchmarks.searching.corpus import Corpus
from tests.benchmarks.searching.peers import Appliance
from tests.benchmarks.searching.workload import Effort, Trial

pytestmark = pytest.mark.anyio


async def test_a_small_corpus_is_searched_by_both_legs_and_the_nearest_are_found(tmp_path: Path) -> None:
    effort = Effort(runs=1, many=5000, queries=4)
    peer = Appliance(tmp_path / "home")
    sample = await searches.many(Trial(peer, effort, 0, tmp_path, tmp_path / "corpora"))
    assert sample.values[searches.RECALL] == 1
    assert sample.values[searches.RECALL_PASSING] == 1
    named = {each.name for each in searches.SEARCHES.quantities}
    assert set(sample.values) == named
    assert all(value > 0 for value in sample.values.values())
    assert set(await peer.build(Corpus(tmp_path / "corpora" / "5000-4", 5000, 4))) == set(peer.steps)
