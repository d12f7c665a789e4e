from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.retrieval import postings
from appliance.retrieval.postings import NONE_REMOVED, MemoryPostings, Part, build, merge, merge_alike

Passages = dict[int, list[str]]


def part(passages: Passages, removed: Sequence[int] = ()) -> Part:
    return Part(build(sorted(passages.items())), np.array(removed, np.uint16))


def contents(of: MemoryPostings) -> dict[int, Counter[int]]:
    """What each passage has: its terms' hashes and counts."""
    found: dict[int, Counter[int]] = {chunk_id: Counter() for chunk_id in of.ids.tolist()}
    for row, term in enumerate(of.terms.tolist()):
        places, counts = of.read(int(of.starts[row]), int(of.starts[row + 1]))
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            found[int(of.ids[place])][term] += count
    return found


PASSAGES = st.dictionaries(st.integers(1, 10**6), st.lists(st.sampled_from("abcdefg"), max_size=12), max_size=12)


@given(st.lists(PASSAGES, min_size=1, max_size=4), st.data())
def test_a_merger_is_what_one_had_built_of_all_that_is_left(groups: list[Passages], data: st.DataObject) -> None:
    parts: list[Part] = []
    left: Passages = {}
    seen: set[int] = set()
    for group in groups:
        passages = {i: terms for i, terms in group.items() if i not in seen}
        seen |= passages.keys()
        removed = [place for place in range(len(passages)) if data.draw(st.booleans())]
        parts.append(part(passages, removed))
        gone = {sorted(passages)[place] for place in removed}
        left |= {i: terms for i, terms in passages.items() if i not in gone}

    merged, expected = merge(parts), part(left).postings
    assert isinstance(expected, MemoryPostings)

    assert merged.ids.tolist() == expected.ids.tolist()
    assert merged.lengths.tolist() == expected.lengths.tolist()
    assert merged.terms.tolist() == expected.terms.tolist()
    assert merged.starts.tolist() == expected.starts.tolist()
    assert contents(merged) == contents(expected)
    assert sorted(i for each in parts for i in postings.alive_ids(each).tolist()) == sorted(left)


@given(st.sets(st.integers(1, 10**9), max_size=30), st.sets(st.integers(1, 10**9), max_size=30), st.integers(1, 10**9))
def test_places_are_those_of_the_wanted_ids(ids: set[int], others: set[int], divisor: int) -> None:
    ids, others = {each % divisor for each in ids}, {each % divisor for each in others}
    rising = np.array(sorted(ids), np.int64)
    places = postings.places_of(rising, np.array(sorted(others), np.int64))
    assert rising[places].tolist() == sorted(ids & others)


def test_few_wanted_ids_of_a_dense_many_are_found() -> None:
    ids = np.arange(10, 1010, dtype=np.int64)
    assert postings.places_of(ids, np.array([1, 10, 500, 1009, 1010], np.int64)).tolist() == [0, 490, 999]


def test_wanted_ids_among_few_that_are_far_apart_are_found() -> None:
    ids = np.array([1, 10**6, 10**9], np.int64)
    assert postings.places_of(ids, np.array([2, 10**6, 10**7, 10**9], np.int64)).tolist() == [1, 2]
    assert postings.places_of(ids[:0], ids).tolist() == []


def test_a_merger_leaves_out_what_is_removed_and_terms_that_nothing_has() -> None:
    merged = merge([part({4: ["a"], 1: ["b", "b"], 9: ["c"]}, removed=[2]), part({2: ["b"], 3: []})])
    expected = build([(1, ["b", "b"]), (2, ["b"]), (3, []), (4, ["a"])])
    assert merged.ids.tolist() == [1, 2, 3, 4]
    assert merged.terms.tolist() == expected.terms.tolist()
    assert contents(merged) == contents(expected)


def test_a_term_counts_255_times_at_most() -> None:
    assert build([(1, ["a"] * 1000)]).counts.tolist() == [255]
    assert build([(1, ["a"] * 1000)]).lengths.tolist() == [1000]


def test_only_parts_of_one_size_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postings, "MOST_PASSAGES", 10)
    parts = [part({10 * n + i: ["a"] for i in range(size)}) for n, size in enumerate((1, 1, 1, 5, 5))]

    def merged(group: Sequence[Part]) -> Part:
        return Part(merge(group), NONE_REMOVED)

    assert merge_alike(parts, merged) == tuple(parts)
    sizes = [each.size for each in merge_alike([*parts, part({90: ["a"]})], merged)]
    assert sizes == [5, 5, 4]
    fives = [part({10 * n + i: ["a"] for i in range(6)}) for n in range(4)]
    assert merge_alike(fives, merged) == tuple(fives), "two of them are too many for one"
