from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.printable import printable


@pytest.mark.parametrize(
    "text", ["", "plain text", "摄像头 三号线", "full width\u3000space", "naïve café", "🐈 and 🦊"]
)
def test_visible_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("a\r\nb", "a\\r\\nb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("nul\0", "nul\\x00"),
        ("\u202egnorw", "\\u202egnorw"),
        ("next\u2028line", "next\\u2028line"),
        ("lone \udc80", "lone \\udc80"),
    ],
)
def test_what_moves_the_cursor_or_hides_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_any_text_becomes_one_line_that_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert shown.encode("utf-8")[:1] != b"\x1b"
    assert printable(shown) == shown
