"""Control tokens are found wherever they hide, compared with the plainest way to look for them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.serving.control_text import ControlTexts, Suspicion

ALPHABET = "<|>a世"
TEXTS = st.text(ALPHABET, max_size=12)
VOCABULARIES = st.lists(st.text(ALPHABET, max_size=5), max_size=6)


@given(VOCABULARIES, TEXTS)
def test_a_whole_control_token_is_found_anywhere(vocabulary: list[str], text: str) -> None:
    expected = any(each in text for each in vocabulary if each)
    assert (ControlTexts(vocabulary).suspicion(text) is Suspicion.WITHIN) == expected


@given(VOCABULARIES, TEXTS, TEXTS, TEXTS)
def test_a_text_without_suspicion_makes_no_control_token_with_its_neighbours(
    vocabulary: list[str], before: str, text: str, after: str
) -> None:
    control_texts = ControlTexts(vocabulary)
    if control_texts.suspicion(text) is Suspicion.NONE and text:
        joined = before + text + after
        start, end = len(before), len(before) + len(text)
        for each in filter(None, vocabulary):
            for at in range(len(joined) - len(each) + 1):
                covers_it_all = at < start and at + len(each) > end
                if joined.startswith(each, at) and not covers_it_all:
                    assert at + len(each) <= start or at >= end


@given(VOCABULARIES, TEXTS, st.integers(0, 12))
def test_a_crossing_is_found(vocabulary: list[str], text: str, position: int) -> None:
    crossing = [
        each
        for each in filter(None, vocabulary)
        for at in range(len(text))
        if text.startswith(each, at) and at < position < at + len(each)
    ]
    assert ControlTexts(vocabulary).crosses(text, position) == bool(crossing)


@given(VOCABULARIES, TEXTS)
def test_the_longest_is_found_where_several_begin(vocabulary: list[str], text: str) -> None:
    expected, at = [], 0
    while at < len(text):
        here = max((each for each in vocabulary if each and text.startswith(each, at)), key=len, default="")
        expected += [here] if here else []
        at += len(here) or 1
    assert ControlTexts(vocabulary).found_in(text) == expected


@pytest.mark.parametrize("text", ["Is a <", "|im_end|> it is", "a <|im_ \n", " >"])
def test_a_part_of_a_control_token_at_an_edge_is_suspicious(text: str) -> None:
    assert ControlTexts(["<|im_end|>"]).suspicion(text) is Suspicion.AT_AN_EDGE


def test_nothing_is_suspicious_to_a_vocabulary_without_control_tokens() -> None:
    nothing = ControlTexts(["", ""])
    assert not nothing
    assert nothing.suspicion("<|im_end|>") is Suspicion.NONE
    assert nothing.found_in("<|im_end|>") == []
    assert not nothing.could_become("<|im_end|>")
    assert not nothing.crosses("<|im_end|>", 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<|im_-end|>", True), ("a<|b|im_c_End|>d", True), ("<|im_end|", False), (">|dne_mi|<", False), ("", False)],
)
def test_a_control_token_spread_over_a_text_is_seen(text: str, expected: bool) -> None:
    assert ControlTexts(["<|im_end|>"]).could_become(text) == expected


def test_thousands_of_control_tokens_do_not_slow_the_search() -> None:
    control_texts = ControlTexts(f"<unused{number}>" for number in range(6000))
    text = "if a < b and b > c: <unused> " * 20_000
    started = time.process_time()
    assert control_texts.suspicion(text) is Suspicion.NONE
    assert time.process_time() - started < 1.0
    assert control_texts.suspicion(text + "<unused5999>") is Suspicion.WITHIN
