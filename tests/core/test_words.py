from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core import words
from appliance.core.words import LONGEST_TERM, passage_terms, query_terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", []),
        ("Pumps, PUMPING; pumped!", ["pump", "pump", "pump"]),
        ("the pump's seal", ["the", "pump", "seal"]),
        ("the pump’s seal…", ["the", "pump", "seal"]),
        ("state-of-the-art", ["state", "of", "the", "art"]),
        ("snake_case and a.b", ["snake", "case", "and", "a", "b"]),
        ("ＰＵＭＰ ﬁlter", ["pump", "filter"]),
        ("Straße STRASSE", ["strass", "strass"]),
        ("naïve nai\u0308ve", ["naïv", "naïv"]),
        ("soft\u00adhyphen", ["softhyphen"]),
        ("水", ["水"]),
        ("水泵", ["水", "泵", "水泵"]),
        ("水泵XR5启动", ["水", "泵", "水泵", "xr5", "xr", "5", "启", "动", "启动"]),
        ("ポンプ", ["ポ", "ン", "プ", "ポン", "ンプ"]),
        ("ﾎﾟﾝﾌﾟ", ["ポ", "ン", "プ", "ポン", "ンプ"]),
        ("😀👍🏽 ok 1️⃣", ["ok", "1"]),
        ("!?… —", []),
        ("_ __", []),
        ("שָׁלוֹם", ["שָׁלוֹם"]),
        ("\u202eمضخّة\u202c", ["مضخّة"]),
        ("हिन्दी", ["हिन्दी"]),
    ],
)
def test_a_passage_gives_these_terms(text: str, terms: list[str]) -> None:
    assert passage_terms(text) == terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("XR-4500/b", ["xr4500b", "xr", "4500", "b"]),
        ("XR4500B", ["xr4500b", "xr", "4500", "b"]),
        ("XR‑4500/B", ["xr4500b", "xr", "4500", "b"]),
        ("IL-6", ["il6", "il", "6"]),
        ("3.14", ["3.14", "3", "14"]),
        ("2024-05-01", ["2024-05-01", "2024", "05", "01"]),
        ("4500", ["4500"]),
        ("12-12", ["12-12", "12"]),
        ("10kg", ["10kg", "10", "kg"]),
        ("AB-12C", ["ab12c", "ab", "12c", "12", "c"]),
    ],
)
def test_a_number_is_kept_whole_and_in_parts(text: str, terms: list[str]) -> None:
    assert passage_terms(text) == terms
    assert query_terms(text) == terms


def test_a_part_number_is_found_however_it_is_written() -> None:
    passage = set(passage_terms("Replace the seal XR-4500/b."))
    for query in ("XR-4500/b", "xr4500b", "XR 4500", "4500", "XR_4500_B", "ＸＲ－４５００"):
        assert passage & set(query_terms(query)), query


def test_stop_words_of_a_question_are_left_out() -> None:
    assert query_terms("What is the pressure of the pump?") == ["pressur", "pump"]


def test_a_question_of_stop_words_only_is_searched_for() -> None:
    assert query_terms("To be or not to be") == ["to", "be", "or", "not"]


def test_stop_words_of_a_passage_are_kept() -> None:
    assert passage_terms("to be") == ["to", "be"]


def test_a_question_has_pairs_of_characters_and_a_single_one_only_where_it_stands_alone() -> None:
    assert query_terms("水泵启动") == ["水泵", "泵启", "启动"]
    assert query_terms("水") == ["水"]


def test_a_long_word_counts_by_its_start() -> None:
    assert passage_terms("a" * 10_000) == ["a" * LONGEST_TERM]
    assert passage_terms("1" * 10_000) == ["1" * LONGEST_TERM]


def test_a_long_word_is_not_remembered() -> None:
    before = words._known_word_terms.cache_info().currsize
    passage_terms("b" * (LONGEST_TERM + 1))
    assert words._known_word_terms.cache_info().currsize == before


@given(st.text(st.characters()))
def test_any_text_gives_short_terms_without_blanks(text: str) -> None:
    for term in passage_terms(text):
        assert 0 < len(term) <= LONGEST_TERM
        assert not any(character.isspace() for character in term)


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_ascii_gives_what_it_gives_among_other_letters(text: str) -> None:
    assert passage_terms(text) == passage_terms(text + " …")


@given(st.text(st.sampled_from("aX1 -/.水泵é\u0301'😀")))
def test_a_question_finds_the_passage_that_it_is(text: str) -> None:
    assert set(query_terms(text)) <= set(passage_terms(text))


@given(st.text(st.sampled_from("abXR45 -/.é水'"), max_size=12))
def test_case_and_width_do_not_matter(text: str) -> None:
    wide = "".join(chr(ord(each) + 0xFEE0) if "!" <= each <= "~" else each for each in text.upper())
    assert passage_terms(wide) == passage_terms(text)
