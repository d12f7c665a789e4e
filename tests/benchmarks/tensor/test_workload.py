from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.benchmarks.tensor.models import Tokens
from tests.benchmarks.tensor.workload import PASSAGE_TOKENS, QUICK, SENTENCE_TOKENS, Corpus


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Return a tokenizer for which every word is the same, unknown one."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(4)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokens(path)


def test_tokens_are_neither_truncated_nor_padded(tokens: Tokens) -> None:
    assert tokens.ids(["one", "one two three four five"]) == [[0], [0] * 5]


def test_sentences_are_distinct_and_short(tokens: Tokens) -> None:
    sentences = Corpus(0, QUICK, tokens).sentences
    assert len(set(sentences)) == QUICK.sentences
    assert max(map(tokens.count, sentences)) <= SENTENCE_TOKENS


def test_passages_are_of_mixed_lengths(tokens: Tokens) -> None:
    lengths = [tokens.count(each) for each in Corpus(0, QUICK, tokens).passages]
    least, greatest = PASSAGE_TOKENS
    assert len(set(lengths)) > QUICK.passages / 2
    assert least <= min(lengths) < 30
    assert 200 < max(lengths) <= greatest


def test_another_run_has_other_texts(tokens: Tokens) -> None:
    first, second = (Corpus(run, QUICK, tokens) for run in (0, 1))
    assert not set(first.sentences) & set(second.sentences)
    assert not set(first.passages) & set(second.passages)
