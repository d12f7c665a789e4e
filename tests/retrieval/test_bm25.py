from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.retrieval import bm25, postings
from appliance.retrieval.bm25 import K1, B, search
from appliance.retrieval.postings import NONE_REMOVED, MemoryPostings, Part, build
from tests.retrieval.test_postings import PASSAGES, Passages, part


def expected_scores(passages: Passages, terms: Sequence[str]) -> dict[int, float]:
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


@given(PASSAGES, st.lists(st.sampled_from("abcdxyz"), unique=True), st.integers(1, 5), st.data())
def test_a_search_ranks_by_bm25(passages: Passages, terms: list[str], k: int, data: st.DataObject) -> None:
    cuts = {chunk_id: data.draw(st.integers(0, 2)) for chunk_id in passages}
    parts = [part({i: each for i, each in passages.items() if cuts[i] == cut}) for cut in range(3)]
    allowed = None if data.draw(st.booleans()) else {i for i in passages if data.draw(st.booleans())}

    found = search(parts, terms, k, None if allowed is None else np.array(sorted(allowed | {7}), np.int64))

    scores = expected_scores(passages, terms) if passages else {}
    expected = sorted(score for i, score in scores.items() if allowed is None or i in allowed | {7})[::-1][:k]
    assert [score for _, score in found] == pytest.approx(expected, rel=1e-5)
    for chunk_id, score in found:
        assert scores[chunk_id] == pytest.approx(score, rel=1e-5)
    assert found == sorted(found, key=lambda hit: (-hit[1], hit[0]))


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
    monkeypatch.setattr(bm25, "MOST_POSTINGS", 3)
    assert [i for i, _ in search(parts, ["common", "rare"], 10)] == [1]
    monkeypatch.setattr(bm25, "MOST_POSTINGS", 1)
    assert sorted(i for i, _ in search(parts, ["common"], 10)) == [1, 2, 3], "the rarest term is always read"


def test_a_question_of_many_terms_is_searched_by_its_rarest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "MOST_TERMS", 1)
    assert [i for i, _ in search([part({1: ["rare", "common"], 2: ["common"]})], ["common", "rare"], 10)] == [1]


def test_equal_scores_are_ranked_by_id_and_cut_the_same_everywhere() -> None:
    passages = {i: ["a"] for i in range(1, 30)}
    one = [part(passages)]
    several = [part({i: passages[i] for i in passages if i % 3 == rest}) for rest in range(3)]
    assert [i for i, _ in search(one, ["a"], 5)] == [1, 2, 3, 4, 5]
    assert search(several, ["a"], 5) == search(one, ["a"], 5)


def test_a_lone_surrogate_is_a_term_like_others() -> None:
    assert search([part({1: ["\ud800"]})], ["\ud800"], 1)[0][0] == 1


@pytest.fixture(params=[1, 10**9])
def worth_judging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "_WORTH_JUDGING", request.param)
    monkeypatch.setattr(bm25, "_SEARCH_COST", min(request.param, 8))


def many(seed: int, count: int = 400) -> Passages:
    """Passages of terms that are rare and frequent as words are."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 30, count)
    return {i + 1: [f"t{rank}" for rank in random.zipf(1.3, length) if rank < 200] for i, length in enumerate(lengths)}


@pytest.mark.usefixtures("worth_judging")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [None, 0.02, 0.9])
def test_passages_that_are_not_looked_at_are_not_among_the_best(seed: int, share: float | None) -> None:
    passages = many(seed)
    random = np.random.default_rng(seed)
    allowed = None if share is None else {i for i in passages if random.random() < share} | {3}
    cuts = [{i: each for i, each in passages.items() if i % 3 == rest} for rest in range(3)]
    removed = {i for cut in cuts for i in list(cut)[::5]}
    parts = [part(cut, range(0, len(cut), 5)) for cut in cuts]
    terms = ["t150", "t90", "t40", "t17", "t5", "t2", "t1"]

    found = search(parts, terms, 5, None if allowed is None else np.array(sorted(allowed), np.int64))

    scores = expected_scores(passages, terms)
    left = {i: score for i, score in scores.items() if i not in removed and (allowed is None or i in allowed)}
    assert [score for _, score in found] == pytest.approx(sorted(left.values())[::-1][:5], rel=1e-5)
    assert all(left[i] == pytest.approx(score, rel=1e-5) for i, score in found)


def test_a_frequent_term_is_looked_up_for_few_passages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int | None] = []
    add = bm25._add

    def noted(*given: Any) -> None:
        added.append(None if given[-1] is None else len(given[-1]))
        add(*given)

    monkeypatch.setattr(bm25, "_add", noted)
    passages = {i: ["common"] + ["rare"] * (i % 1000 == 0) for i in range(1, 10_001)}
    found = search([part(passages)], ["common", "rare"], 5)
    assert [i for i, _ in found] == [1000, 2000, 3000, 4000, 5000]
    assert added == [None, 10]
    added.clear()
    halves = [part({i: each for i, each in passages.items() if (i > 5000) == late}) for late in (False, True)]
    assert search(halves, ["common", "rare"], 5) == found
    assert added == [None, 5, None, 5]


def test_a_place_that_a_flipped_bit_made_up_harms_no_other() -> None:
    made = build([(1, ["a"]), (2, ["b"])])
    flipped = MemoryPostings(
        made.ids, made.lengths, made.terms, made.starts, made.places + np.uint16(4096), made.counts
    )
    assert {i for i, _ in search([Part(flipped, NONE_REMOVED)], ["a", "b"], 5)} == {2}
