"""How states become a vector, and how a long text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import ModelFileError
from appliance.engine.llama_embedding.pooling import Pooling, pooling_of, shortened


@pytest.mark.parametrize(
    ("declared", "pooling"),
    [(None, Pooling.MEAN), ("0", Pooling.MEAN), ("1", Pooling.MEAN), ("2", Pooling.CLS), ("3", Pooling.LAST)],
)
def test_a_file_says_how_it_is_pooled_and_one_that_does_not_by_the_mean(declared: str, pooling: Pooling) -> None:
    assert pooling_of(declared) == pooling


@pytest.mark.parametrize("declared", ["4", "-1", "99", "mean"])
def test_another_kind_is_refused_by_its_number(declared: str) -> None:
    with pytest.raises(ModelFileError, match=f"pooling type {declared}"):
        pooling_of(declared)


@given(
    st.lists(st.integers(10, 99), max_size=30),
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.integers(4, 6), max_size=2),
    st.integers(1, 40),
)
def test_a_cut_text_keeps_its_start_and_the_tokens_at_the_end(
    plain: list[int], start: list[int], end: list[int], longest: int
) -> None:
    tokens = [*start, *plain, *end]
    cut = shortened(tokens, plain, longest)
    assert len(cut) == min(longest, len(tokens))
    if longest >= len(start) + len(end):
        assert cut[len(cut) - len(end) :] == end
        assert cut[: len(cut) - len(end)] == tokens[: len(cut) - len(end)]
    if longest >= len(tokens):
        assert cut == tokens


def test_tokens_that_are_not_found_again_are_cut_at_the_end() -> None:
    assert shortened([7, 1, 2, 3], [9, 9], 3) == [7, 1, 2]
