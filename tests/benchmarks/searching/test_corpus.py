"""The corpus is what it says: the same each time, clustered, and with exact answers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.searching.corpus import SHARES, TEXTS_A_FILE, Corpus, K, attribute, recall
from tests.benchmarks.searching.vectors import BLOCK, DIMENSION, Mixture

COUNT = BLOCK + 1000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    made = Corpus(tmp_path_factory.mktemp("corpus"), COUNT, 5)
    made.make()
    return made


def test_the_exact_answers_are_those_of_plain_arithmetic(corpus: Corpus) -> None:
    rows = np.concatenate(list(corpus.vectors()))
    scores = corpus.query_vectors() @ rows.T
    assert rows.shape == (COUNT, DIMENSION)
    np.testing.assert_array_equal(corpus.exact(), np.argsort(-scores, axis=1)[:, :K])
    scores[:, attribute(np.arange(COUNT)) != 0] = -2
    np.testing.assert_array_equal(corpus.exact(filtered=True), np.argsort(-scores, axis=1)[:, :K])


def test_one_text_in_a_hundred_has_an_attribute_and_a_file_has_one() -> None:
    parts = attribute(np.arange(10 * SHARES * TEXTS_A_FILE))
    assert np.count_nonzero(parts == 0) == 10 * TEXTS_A_FILE
    assert (parts.reshape(-1, TEXTS_A_FILE) == parts[::TEXTS_A_FILE, None]).all()


def test_each_text_and_query_has_its_words_and_they_are_the_same_each_time(corpus: Corpus) -> None:
    found = list(corpus.texts())
    assert len(found) == COUNT
    assert found == list(corpus.texts())
    assert {len(each.split()) for each in corpus.query_texts()} == {6}
    assert len(corpus.query_texts()) == len(corpus.query_vectors()) == 5


def test_neighbours_are_as_near_as_those_of_a_real_embedder() -> None:
    rows = np.concatenate(list(Mixture(5183).blocks()))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    scores = np.sort(rows[:500] @ rows.T, axis=1)[:, ::-1]
    nearest, tenth, hundredth, any_other = np.median(scores[:, [1, 10, 100, 2500]], axis=0)
    assert (nearest, tenth, hundredth, any_other) == pytest.approx((0.68, 0.53, 0.40, 0.15), abs=0.03)


def test_recall_counts_what_was_found_in_any_order() -> None:
    assert recall([[2, 1], [3, 9]], np.array([[1, 2], [3, 4]])) == 0.75


def test_a_corpus_that_is_there_is_not_made_again(corpus: Corpus) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.folder.iterdir()}
    corpus.make()
    assert {path: path.stat().st_mtime_ns for path in corpus.folder.iterdir()} == before
