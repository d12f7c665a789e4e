"""How the states of a text's tokens become one vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import ModelFileError
from appliance.engine.onnx.pooling import Pooling, normalised, pooled, poolings_of

STATES = np.array([[[1.0, -4.0], [3.0, 0.0], [8.0, 9.0]], [[5.0, 6.0], [7.0, 7.0], [0.5, 0.25]]], np.float32)
LENGTHS = np.array([2, 3])


@pytest.mark.parametrize(
    ("way", "first", "second"),
    [
        (Pooling.CLS, (1.0, -4.0), (5.0, 6.0)),
        (Pooling.MAX, (3.0, 0.0), (7.0, 7.0)),
        (Pooling.MEAN, (2.0, -2.0), (12.5 / 3, 13.25 / 3)),
        (Pooling.MEAN_SQRT_LEN, (4 / 2**0.5, -4 / 2**0.5), (12.5 / 3**0.5, 13.25 / 3**0.5)),
        (Pooling.WEIGHTED_MEAN, (7 / 3, -4 / 3), (20.5 / 6, 20.75 / 6)),
        (Pooling.LAST, (3.0, 0.0), (0.5, 0.25)),
    ],
)
def test_a_text_is_pooled_up_to_its_own_end(
    way: Pooling, first: tuple[float, float], second: tuple[float, float]
) -> None:
    assert pooled(STATES, LENGTHS, [way]) == pytest.approx(np.array([first, second]), rel=1e-6)


def test_several_ways_stand_one_behind_the_other() -> None:
    both = pooled(STATES, LENGTHS, [Pooling.CLS, Pooling.MEAN])
    assert both.shape == (2, 4)
    assert both[:, :2] == pytest.approx(STATES[:, 0])
    assert both[:, 2:] == pytest.approx(pooled(STATES, LENGTHS, [Pooling.MEAN]))


def test_half_precision_is_summed_in_full() -> None:
    states = np.full((1, 4000, 1), 30.0, np.float16)  # their sum is no 16-bit float
    assert pooled(states, np.array([4000]), [Pooling.MEAN]) == pytest.approx(np.array([[30.0]]), rel=1e-4)


@given(st.data(), st.sampled_from(Pooling), st.integers(1, 5), st.integers(1, 7))
def test_padding_counts_for_nothing(data: st.DataObject, way: Pooling, texts: int, longest: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, longest), min_size=texts, max_size=texts)))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    states: npt.NDArray[Any] = random.standard_normal((texts, longest, 3)).astype(np.float32)
    together = pooled(states, lengths, [way])
    for text, length in enumerate(lengths):
        alone = pooled(states[text : text + 1, :length], np.array([length]), [way])
        assert together[text] == pytest.approx(alone[0], abs=1e-5)


def test_a_vector_gets_length_1_and_one_without_direction_is_not_a_number() -> None:
    vectors = normalised(np.array([[3.0, 4.0], [0.0, 0.0], [np.inf, 1.0]], np.float32))
    assert vectors[0] == pytest.approx(np.array([0.6, 0.8]))
    assert np.isnan(vectors[1]).all()
    assert np.isnan(vectors[2]).any()


@pytest.mark.parametrize(
    ("config", "poolings"),
    [
        ({}, (Pooling.MEAN,)),
        ({"word_embedding_dimension": 384, "include_prompt": True}, (Pooling.MEAN,)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, (Pooling.CLS,)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, (Pooling.CLS, Pooling.MEAN)),
        ({"pooling_mode_max_tokens": True}, (Pooling.MAX,)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, (Pooling.MEAN_SQRT_LEN,)),
        ({"pooling_mode_weightedmean_tokens": True}, (Pooling.WEIGHTED_MEAN,)),
        ({"pooling_mode_lasttoken": True}, (Pooling.LAST,)),
    ],
)
def test_a_folder_says_how_it_is_pooled_and_one_that_does_not_by_the_mean(
    config: dict[str, Any], poolings: tuple[Pooling, ...]
) -> None:
    assert poolings_of(config) == poolings


def test_a_way_that_is_not_known_is_refused_by_its_name() -> None:
    with pytest.raises(ModelFileError, match="pooling_mode_by_magic"):
        poolings_of({"pooling_mode_by_magic": True, "pooling_mode_cls_token": True})
