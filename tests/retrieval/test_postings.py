from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.retrieval import postings
from appliance.retrieval.postings import K1, NONE_REMOVED, B, MemoryPostings, Part, build, merge, merge_alike, search

Passages = dict[int, list[str]]


def part(passages: Passages, removed: Sequence[int] = ()) -> Part:
    return Part(build(sorted(passages.items())), np.array(removed, np.uint16))


def bm25(passages: Passages, terms: Sequence[str]) -> dict[int, float]:
    """The formula, passage by passage."""
    average = max(sum(map(len, passages.values())) / len(passages), 1.0)
    scores: dict[int, float] = {}
    for term in terms:
        n = sum(term in each for each in passages.values())
        idf = math.log(1 + (len(passages) - n + 0.5) / (n + 0.5))
        for chunk_id, each in passages.items():
            count = min(Counter(each)[term], 255)
            if count:
                norm = K1 * (1 - B + B * len(each) / average)
                scores[chunk_id] = scores.get(chunk_id, 0.0) + idf * (K1 + 1) * count / (count + norm)
    return scores


def contents(of: MemoryPostings) -> dict[int, Counter[int]]:
    """What each passage has: its terms' hashes and counts."""
    found: dict[int, Counter[int]] = {chunk_id: Counter() for chunk_id in of.ids.tolist()}
    for row, term in enumerate(of.terms.tolist()):
        places, counts = of.read(int(of.starts[row]), int(of.starts[row + 1]))
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            found[int(of.ids[place])][term] += count
    return found


PASSAGES = st.dictionaries(st.integers(1, 10**6), st.lists(st.sampled_from("abcdefg"), max_size=12), max_size=12)


@given(PASSAGES, st.lists(st.sampled_from("abcdxyz"), unique=True), st.integers(1, 5), st.data())
def test_a_search_ranks_by_bm25(passages: Passages, terms: list[str], k: int, data: st.DataObject) -> None:
    cuts = {chunk_id: data.draw(st.integers(0, 2)) for chunk_id in passages}
    parts = [part({i: each for i, each in passages.items() if cuts[i] == cut}) for cut in range(3)]
    allowed = None if data.draw(st.booleans()) else {i for i in passages if data.draw(st.booleans())}

    found = search(parts, terms, k, None if allowed is None else np.array(sorted(allowed | {7}), np.int64))

    scores = bm25(passages, terms) if passages else {}
    expected = sorted(score for i, score in scores.items() if allowed is None or i in allowed | {7})[::-1][:k]
    assert [score for _, score in found] == pytest.approx(expected, rel=1e-5)
    for chunk_id, score in found:
        assert scores[chunk_id] == pytest.approx(score, rel=1e-5)
    assert found == sorted(found, key=lambda hit: (-hit[1], hit[0]))


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


@pytest.mark.parametrize("chosen", [[5], [2, 5], list(range(1, 10)), list(range(1, 10, 2)), [5, 77]])
def test_allowed_passages_keep_their_scores_and_ranks(chosen: list[int]) -> None:
    parts = [part({i: ["a"] * (i % 4 + 1) + ["b"] * i for i in range(1, 10)})]
    free = search(parts, ["a", "b"], 20)
    assert search(parts, ["a", "b"], 20, np.array(chosen, np.int64)) == [hit for hit in free if hit[0] in chosen]


def test_what_is_removed_is_not_found() -> None:
    halved = part({1: ["a"], 2: ["a"]}, removed=[0])
    assert [i for i, _ in search([halved], ["a"], 10)] == [2]
    assert postings.alive_ids(halved).tolist() == [2]
    assert postings.alive_ids(part({1: ["a"]})).tolist() == [1]


def test_passages_without_terms_are_not_found() -> None:
    assert search([part({1: []}), part({2: ["a"]})], ["a"], 10)[0][0] == 2
    assert search([part({1: []})], ["a"], 10) == []


def test_a_part_without_allowed_passages_is_not_read() -> None:
    class Unreadable(MemoryPostings):
        def read(self, start: int, end: int) -> tuple[postings.Places, postings.Counts]:
            raise AssertionError("it was read")

    made = build([(1, ["a"])])
    far = Part(Unreadable(made.ids, made.lengths, made.terms, made.starts, made.places, made.counts), NONE_REMOVED)
    assert [i for i, _ in search([far, part({5: ["a"]})], ["a"], 10, np.array([5], np.int64))] == [5]


@pytest.mark.parametrize(("terms", "k"), [([], 5), (["a"], 0), (["x"], 5)])
def test_nothing_is_found_by_nothing(terms: list[str], k: int) -> None:
    assert search([part({1: ["a"]})], terms, k) == []
    assert search([], terms, k) == []


def test_many_common_terms_are_read_as_far_as_the_budget_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [part({1: ["rare", "common"], 2: ["common"], 3: ["common"]})]
    monkeypatch.setattr(postings, "MOST_POSTINGS", 3)
    assert [i for i, _ in search(parts, ["common", "rare"], 10)] == [1]
    monkeypatch.setattr(postings, "MOST_POSTINGS", 1)
    assert sorted(i for i, _ in search(parts, ["common"], 10)) == [1, 2, 3], "the rarest term is always read"


def test_a_question_of_many_terms_is_searched_by_its_rarest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postings, "MOST_TERMS", 1)
    assert [i for i, _ in search([part({1: ["rare", "common"], 2: ["common"]})], ["common", "rare"], 10)] == [1]


def test_equal_scores_are_ranked_by_id_and_cut_the_same_everywhere() -> None:
    passages = {i: ["a"] for i in range(1, 30)}
    one = [part(passages)]
    several = [part({i: passages[i] for i in passages if i % 3 == rest}) for rest in range(3)]
    assert [i for i, _ in search(one, ["a"], 5)] == [1, 2, 3, 4, 5]
    assert search(several, ["a"], 5) == search(one, ["a"], 5)


def test_a_term_counts_255_times_at_most() -> None:
    assert build([(1, ["a"] * 1000)]).counts.tolist() == [255]
    assert build([(1, ["a"] * 1000)]).lengths.tolist() == [1000]


def test_a_lone_surrogate_is_a_term_like_others() -> None:
    assert search([part({1: ["\ud800"]})], ["\ud800"], 1)[0][0] == 1


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
