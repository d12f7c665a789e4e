from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.store.outbox_rows import GAP, ROW_BYTES, Row, content, merge, rank, squeeze, without


def fact(sequence: int, *, boot: int = 1, body: bytes = b'{"a":1}') -> Row:
    at = float(100 * boot + sequence)
    return Row("metric", boot, sequence, sequence, at, at, at, 0, "x", body)


def gap(first: int, last: int, *, boot: int = 1, lost: int | None = None) -> Row:
    count = lost if lost is not None else last - first + 1
    return Row("metric", boot, first, last, float(first), float(last), float(last), count, GAP, b"")


def test_a_facts_body_is_its_own_and_a_gaps_says_what_is_missing() -> None:
    assert content(fact(1)) == {"a": 1}
    assert content(gap(2, 5, lost=9)) == {"first": 2, "count": 9, "from": 2.0, "to": 5.0}
    assert fact(1).size == ROW_BYTES + 1 + 7
    assert [rank("alarm"), rank("sample")] == [0, 4]


def test_a_gap_grows_over_its_neighbours() -> None:
    grown = merge(merge(None, fact(3)), fact(4))
    assert (grown.first, grown.last, grown.lost, grown.at, grown.until) == (3, 4, 2, 103.0, 104.0)
    both = merge(grown, gap(5, 9))
    assert (both.first, both.last, both.lost) == (3, 9, 7)


def test_a_gap_of_an_earlier_boot_goes_over_into_the_next_ones() -> None:
    over = merge(gap(1, 9, boot=1), fact(1, boot=2))
    assert (over.boot, over.first, over.last, over.lost, over.at) == (2, 1, 1, 10, 1.0)


def test_no_more_is_lost_than_must_be() -> None:
    rows = [fact(each, body=b"x" * 400) for each in range(1, 10)]
    victims, made = squeeze(rows, lambda freed, _: freed >= 300)
    assert victims == rows[:1]
    assert made == merge(None, rows[0])
    assert squeeze(rows, lambda *_: True) == ([], None)


def test_a_lone_gap_stays() -> None:
    assert squeeze([gap(1, 5)], lambda *_: False) == ([], None)


def test_everything_goes_when_that_is_asked() -> None:
    victims, made = squeeze([gap(1, 5), fact(6)], lambda *_: False)
    assert len(victims) == 2
    assert made is not None
    assert (made.first, made.last, made.lost) == (1, 6, 6)


def test_what_the_hub_has_is_gone_and_the_rest_stays() -> None:
    assert without(fact(5), 6, 9) == [fact(5)]
    assert without(fact(5), 1, 4) == [fact(5)]
    assert without(fact(5), 5, 5) == []
    assert without(gap(5, 9), 1, 20) == []
    before, after = without(gap(1, 10), 4, 6)
    assert (before.first, before.last, before.lost) == (1, 3, 3)
    assert (after.first, after.last, after.lost) == (7, 10, 4)
    (only,) = without(gap(1, 10, lost=30), 1, 6)
    assert (only.first, only.last, only.lost) == (7, 10, 24)
    (only,) = without(gap(1, 10, lost=30), 6, 12)
    assert (only.first, only.last, only.lost) == (1, 5, 25)


def test_a_gap_that_spans_what_the_hub_had_never_tells_more_than_before() -> None:
    (only,) = without(gap(1, 25, lost=17), 21, 35)
    assert (only.first, only.last, only.lost) == (1, 20, 17)
    parts = without(gap(1, 20, lost=3), 8, 9)
    assert [(each.first, each.last, each.lost) for each in parts] == [(1, 7, 1), (10, 20, 2)]
    assert [each.lost for each in without(gap(1, 20, lost=1), 8, 9)] == [1, 1], "nobody knows in which"


@given(
    first=st.integers(1, 20),
    length=st.integers(1, 20),
    earlier=st.integers(0, 5),
    acked=st.integers(1, 40),
    acked_length=st.integers(1, 40),
)
def test_an_acknowledgement_takes_exactly_its_sequences(
    first: int, length: int, earlier: int, acked: int, acked_length: int
) -> None:
    row = gap(first, first + length - 1, lost=length + earlier)
    rest = without(row, acked, acked + acked_length - 1)
    left = {each for part in rest for each in range(part.first, part.last + 1)}
    assert left == set(range(first, first + length)) - set(range(acked, acked + acked_length))
    assert all(part.lost >= part.last - part.first + 1 for part in rest)
    assert sum(part.lost for part in rest) <= row.lost
