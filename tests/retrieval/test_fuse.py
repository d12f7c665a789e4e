"""Two rankings become one: by hand, and for any rankings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.retrieval.fuse import (
    JOINED_AMONG,
    LEAST_BEST_COSINE,
    LEAST_COVERAGE,
    MOST_JOINED,
    RRF_K,
    SURE_COVERAGE,
    SURE_LEAD,
    Candidate,
    Confidence,
    Found,
    Passage,
    Place,
    confidence,
    fuse,
    joined,
    places,
    relevant,
    reordered,
    semantic_weight,
    within_budget,
    without_duplicates,
)

DOCUMENT = "".join(f"sentence {number:03}. " for number in range(100))


def leg(*chunks: int) -> dict[int, Place]:
    return places([[(chunk, 1.0 - rank / 100) for rank, chunk in enumerate(chunks)]])


def found(
    chunk: int, start: int, end: int, *, file: int = 1, position: int | None = None, text: str | None = None
) -> Found:
    text = DOCUMENT[start:end] if text is None else text
    place = chunk if position is None else position
    passage = Passage(chunk, file, place, text, start, end, None, (), end - start, text.encode().ljust(32)[:32])
    return Found(passage, Candidate(chunk, 1 / (chunk + 1), None, None), 1 / (chunk + 1))


def chunks(hits: Sequence[Found]) -> list[int]:
    return [each.passage.chunk for each in hits]


# Ranks


def test_the_best_rank_over_all_phrasings_counts() -> None:
    found = places([[(1, 9.0), (2, 8.0)], [(3, 7.0), (1, 6.0)], [(3, 8.0)]])
    assert found == {1: Place(1, 9.0), 2: Place(2, 8.0), 3: Place(1, 8.0)}


def test_what_scores_too_little_has_no_rank() -> None:
    assert places([[(1, 0.4), (2, 0.1)]], 0.15) == {1: Place(1, 0.4)}


def test_ranks_are_fused_by_their_reciprocals() -> None:
    k = RRF_K
    ranking = fuse(leg(1, 2), leg(2, 3))
    best = 2 / (k + 1)
    assert [each.chunk for each in ranking] == [2, 1, 3]
    assert [each.score for each in ranking] == pytest.approx(
        [(1 / (k + 2) + 1 / (k + 1)) / best, 1 / (k + 1) / best, 1 / (k + 2) / best]
    )


def test_first_in_every_leg_that_took_part_is_one() -> None:
    for words, meanings in (((1, 2), (1, 3)), ((1, 2), ()), ((), (1, 2))):
        assert fuse(leg(*words), leg(*meanings), weight=0.3)[0].score == pytest.approx(1.0)
    assert fuse({}, {}) == []


def test_a_leg_with_little_weight_only_adds_to_the_end() -> None:
    ranking = fuse(leg(*range(1, 11)), leg(*range(20, 30)), weight=0.01)
    assert [each.chunk for each in ranking][:10] == list(range(1, 11))


@given(
    st.lists(st.integers(0, 30), unique=True, max_size=20),
    st.lists(st.integers(0, 30), unique=True, max_size=20),
    st.floats(0.001, 1),
    st.integers(10, 60),
)
def test_a_ranking_holds_what_was_found_once_and_never_against_both_legs(
    words: list[int], meanings: list[int], weight: float, k: int
) -> None:
    ranking = fuse(leg(*words), leg(*meanings), weight=weight, k=k)
    scores = [each.score for each in ranking]
    assert sorted(each.chunk for each in ranking) == sorted({*words, *meanings})
    assert scores == sorted(scores, reverse=True)
    assert all(0 < each <= 1 + 1e-9 for each in scores)
    order = {each.chunk: number for number, each in enumerate(ranking)}
    both = [each for each in words if each in meanings]
    for better in both:
        for worse in both:
            if words.index(better) < words.index(worse) and meanings.index(better) < meanings.index(worse):
                assert order[better] < order[worse]


# Trust


def test_a_keyword_leg_is_as_sure_as_its_words_and_its_lead() -> None:
    answer = [(1, 12.0), (2, 6.0), (3, 4.0)]
    assert confidence(answer, ["pump", "oil"], [["oil"], ["pump", "leak"]]) == Confidence(0.5, 3.0)
    assert confidence([(each, 10.0 - each) for each in range(50)], ["a"], [["a"]]).lead == 10.0
    assert confidence([], ["pump"], []) == Confidence(0.0, 1.0)
    assert confidence([(1, 0.0)], [], [["x"]]).coverage == 0.0


def test_the_semantic_leg_counts_less_the_further_the_keyword_leg_leads() -> None:
    weights = [semantic_weight(Confidence(1.0, lead)) for lead in (1.0, SURE_LEAD, 2.0, 4.0, 8.0)]
    assert weights[:2] == [1.0, 1.0]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] < 0.01


WORDS, NEAR, FAR = leg(1), {2: Place(1, LEAST_BEST_COSINE)}, {2: Place(1, LEAST_BEST_COSINE - 0.01)}


@pytest.mark.parametrize(
    ("meanings", "coverage", "complete", "expected"),
    [
        (NEAR, 0.0, True, (WORDS, NEAR)),
        (FAR, SURE_COVERAGE, True, (WORDS, {})),
        (FAR, SURE_COVERAGE - 0.01, True, ({}, {})),
        (FAR, LEAST_COVERAGE, False, (WORDS, {})),
        ({}, LEAST_COVERAGE, False, (WORDS, {})),
        ({}, LEAST_COVERAGE - 0.01, False, ({}, {})),
    ],
)
def test_nothing_relevant_is_an_answer(
    meanings: dict[int, Place], coverage: float, *, complete: bool, expected: tuple[object, object]
) -> None:
    assert relevant(WORDS, meanings, Confidence(coverage, 1.0), complete=complete) == expected


# Reranking


def test_a_reranker_orders_the_best_and_nothing_behind_them_scores_more() -> None:
    ranking = reordered([found(each, each, each + 1) for each in range(4)], [0.2, 0.9, 1.5])
    assert chunks(ranking) == [2, 1, 0, 3]
    assert [each.score for each in ranking] == [1.0, 0.9, 0.2, 0.2]
    assert [each.rerank_score for each in ranking] == [1.5, 0.9, 0.2, None]
    assert reordered([], []) == []


# Passages


def test_the_same_text_is_given_once_where_it_ranks_best() -> None:
    assert chunks(without_duplicates([found(3, 0, 9), found(1, 0, 9, file=2), found(2, 9, 18)])) == [3, 2]


def test_passages_that_do_not_fit_the_budget_are_left_out() -> None:
    hits = [found(1, 0, 50), found(2, 100, 200), found(3, 300, 340)]
    assert chunks(within_budget(hits, 95)) == [1, 3]
    assert within_budget(hits, None) == hits
    assert within_budget(hits, 0) == []


def test_overlapping_neighbours_become_one_passage_without_repeating_anything() -> None:
    (hit,) = joined([found(2, 80, 200), found(1, 0, 100)])
    assert (hit.passage.text, hit.passage.start, hit.passage.end) == (DOCUMENT[0:200], 0, 200)
    assert hit.candidate.chunk == 2
    assert hit.passage.tokens == 220


def test_neighbours_that_touch_or_are_blocks_apart_are_joined() -> None:
    assert joined([found(1, 0, 50), found(2, 50, 90)])[0].passage.text == DOCUMENT[0:90]
    assert joined([found(1, 0, 50), found(2, 52, 90)])[0].passage.text == DOCUMENT[0:50] + "\n\n" + DOCUMENT[52:90]


def test_what_is_no_neighbour_stays_apart() -> None:
    hits = [found(1, 0, 50), found(3, 50, 90), found(4, 90, 99, file=2), found(2, 50, 90, file=3)]
    assert joined(hits) == hits


def test_a_neighbour_whose_text_is_not_that_of_its_span_stays_apart() -> None:
    hits = [found(1, 0, 100), found(2, 80, 200, text="| head | of the table |")]
    assert joined(hits) == hits
    whole = [found(1, 0, 100), found(2, 80, 90)]
    assert joined(whole) == whole, "it is inside the first"


def test_no_more_than_three_are_joined_and_only_among_the_best() -> None:
    run = [found(each, 10 * each, 10 * each + 10) for each in range(7)]
    assert [len(each.passage.text) // 10 for each in joined(run)] == [MOST_JOINED, MOST_JOINED, 1]
    apart = [found(each, 10 * each, 10 * each + 10, position=2 * each) for each in range(JOINED_AMONG)]
    late = [found(40, 10, 20, position=1), found(41, 20, 30, position=3)]
    assert joined(apart + late) == apart + late


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_joining_loses_and_doubles_nothing(order: list[int], gone: set[int]) -> None:
    hits = [found(each, 30 * each, 30 * each + 40) for each in order if each not in gone]
    spans = [(each.passage.start, each.passage.end) for each in joined(hits)]
    assert {place for start, end in spans for place in range(start, end)} == {
        place for each in hits for place in range(each.passage.start, each.passage.end)
    }
    assert all(each.passage.text == DOCUMENT[each.passage.start : each.passage.end] for each in joined(hits))
