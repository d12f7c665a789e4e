"""Log probabilities in both forms."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from appliance.api.openai.logprobs import SMALLEST_LOGPROB, TextOffsets, chat_logprobs, text_logprobs
from appliance.core.types import TokenLogprob

WORLD = "世".encode()


def test_the_chat_form_has_exact_bytes_where_text_cannot_be() -> None:
    whole, half = chat_logprobs(
        [
            TokenLogprob(1, b"Hi", -0.5, ((1, b"Hi", -0.5), (2, WORLD[:1], -math.inf))),
            TokenLogprob(3, WORLD[:2], -1.0),
        ]
    )
    assert (whole.token, whole.logprob, whole.bytes) == ("Hi", -0.5, [72, 105])
    assert [(each.token, each.logprob) for each in whole.top_logprobs] == [("Hi", -0.5), ("\ufffd", SMALLEST_LOGPROB)]
    assert half.bytes == list(WORLD[:2])
    assert half.top_logprobs == []


def test_the_older_form_keeps_parts_of_characters_apart_and_has_the_chosen_token_among_the_top() -> None:
    tokens = [TokenLogprob(1, WORLD[:1], -2.0, ((5, b"a", -0.1),)), TokenLogprob(2, WORLD[1:], -3.0)]
    logprobs = text_logprobs(tokens, TextOffsets(4))
    assert logprobs.tokens == [r"bytes:\xe4", r"bytes:\xb8\x96"]
    assert logprobs.token_logprobs == [-2.0, -3.0]
    assert logprobs.top_logprobs == [{"a": -0.1, r"bytes:\xe4": -2.0}, {r"bytes:\xb8\x96": -3.0}]
    assert logprobs.text_offset == [4, 4]


@given(st.text(), st.lists(st.integers(1, 4)), st.integers(0, 9))
def test_offsets_point_at_the_character_in_which_a_token_starts(text: str, sizes: list[int], start: int) -> None:
    data, pieces = text.encode(), []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    pieces.append(data)
    offsets = TextOffsets(start)
    seen = b""
    for piece in pieces:
        assert offsets.next(piece) == start + len(seen.decode(errors="ignore"))
        seen += piece
