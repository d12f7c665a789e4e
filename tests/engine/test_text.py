"""Text is sent as soon as it is certain, never half a character, never a stop string."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.llama.text import TextAssembler

# A small alphabet makes stop strings overlap each other and themselves.
words = st.text(st.sampled_from("ab中é😀"), max_size=12)
stops = st.lists(st.text(st.sampled_from("ab中é😀"), min_size=1, max_size=4), max_size=3)


def cut(text: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@given(words, stops, st.lists(st.integers(0, 60), max_size=8))
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stop: list[str], places: list[int]
) -> None:
    subject = TextAssembler(stop)
    pieces = [subject.push(piece) for piece in cut(text.encode(), places)]
    released = "".join([*pieces, subject.finish()])
    assert not any(each in "".join(pieces) for each in stop)
    if subject.stopped:
        assert text.startswith(released)
        assert any(text[len(released) :].startswith(each) for each in stop)
    else:
        assert released == text
        assert not any(each in text for each in stop)
    assert subject.released == len(released)


@given(words, st.lists(st.integers(0, 60), max_size=8))
def test_without_stop_strings_every_whole_character_is_sent_at_once(text: str, places: list[int]) -> None:
    subject = TextAssembler()
    seen = b""
    sent = ""
    for piece in cut(text.encode(), places):
        seen += piece
        sent += subject.push(piece)
        assert sent == seen.decode(errors="ignore")


def test_bytes_that_are_no_character_become_a_replacement_character() -> None:
    subject = TextAssembler()
    assert subject.push(b"a\xff") == "a�"
    assert subject.push("中".encode()[:2]) == ""
    assert subject.finish() == "�"


def test_nothing_follows_a_stop_string() -> None:
    subject = TextAssembler(["END"])
    assert subject.push(b"one E") == "one "
    assert subject.push(b"ND two") == ""
    assert subject.stopped
    assert subject.push(b"three") == ""
    assert subject.finish() == ""


def test_a_stop_string_finished_by_an_incomplete_character_counts() -> None:
    subject = TextAssembler(["�"])
    assert subject.push("中".encode()[:2]) == ""
    assert subject.finish() == ""
    assert subject.stopped
