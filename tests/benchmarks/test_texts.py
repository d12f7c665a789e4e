from __future__ import annotations

import re
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.texts import _TOPICS, prose, quoted_share, text


def words(passage: str) -> int:
    return len(passage.split())


@given(st.text(max_size=20))
def test_prose_is_the_same_for_the_same_seed_and_no_sentence_comes_twice(seed: str) -> None:
    sentences = list(islice(prose(seed), 100))
    assert sentences == list(islice(prose(seed), 100))
    assert len(set(sentences)) == 100
    assert all(re.fullmatch(r"[“A-Z].*\.", each) for each in sentences)


def test_other_seeds_give_other_texts_from_the_beginning_on() -> None:
    beginnings = {text(f"0/chat {number}", 12, words) for number in range(100)}
    assert len(beginnings) == 100


@given(st.text(max_size=5))
def test_a_long_text_has_all_topics(seed: str) -> None:
    sentences = list(islice(prose(seed), 7 * len(_TOPICS)))
    for people, things, _ in _TOPICS.values():
        assert any(word in sentence for sentence in sentences for word in (*people, *things))


@given(st.text(max_size=5), st.integers(5, 300))
def test_a_text_has_the_tokens_that_were_asked_for(seed: str, tokens: int) -> None:
    assert words(text(seed, tokens, words)) == tokens


@given(st.integers(20, 300))
def test_a_text_whose_words_have_many_tokens_is_a_little_shorter_but_never_longer(tokens: int) -> None:
    assert tokens - 20 < len(text("any", tokens, len)) <= tokens


def test_the_share_of_an_answer_that_is_quoted() -> None:
    source = "one two three four five six seven eight"
    assert quoted_share(source, source) == 1
    assert quoted_share("eight seven six five four three two one", source) == 0
    assert quoted_share("one two three four nine", source) == 0.5
    assert quoted_share("too short", source) == 0
