"""What the programs in models/examples make of a model's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests import examples

speech = examples.load("detect_speech")
text = examples.load("detect_text")

LOUD, QUIET, BETWEEN = 0.9, 0.1, 0.4


def test_windows_overlap_by_their_context_and_hold_every_sample() -> None:
    sound = np.arange(1, 1201, dtype=np.float32)
    first, second, third = speech.windows(sound)
    assert len(first) == len(third) == 64 + 512
    assert first[:64].tolist() == [0] * 64
    assert second[:64].tolist() == first[-64:].tolist()
    assert np.concatenate([first[64:], second[64:], third[64:]]).tolist() == [*sound.tolist(), *[0.0] * 336]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([QUIET] * 20, []),
        ([LOUD] * 20, [(0, 20 * 512)]),
        ([QUIET] * 5 + [LOUD] * 20 + [QUIET] * 9, [(5 * 512 - 480, 25 * 512 + 480)]),
        ([LOUD] * 10 + [QUIET] * 2 + [LOUD] * 10, [(0, 22 * 512)]),
        ([LOUD] * 10 + [BETWEEN] * 30 + [LOUD] * 10, [(0, 50 * 512)]),
        ([LOUD] * 7 + [QUIET] * 20, []),
        ([LOUD] * 10 + [QUIET] * 10 + [LOUD] * 10, [(0, 10 * 512 + 480), (20 * 512 - 480, 30 * 512)]),
    ],
)
def test_speech_begins_loud_and_ends_with_a_pause(found: list[float], wanted: list[tuple[int, int]]) -> None:
    assert speech.segments(found, len(found) * 512) == wanted


def test_a_wav_file_is_read_as_one_channel(tmp_path: Path) -> None:
    sound = examples.tone(0.1)
    read = speech.read_wav(examples.write_wav(tmp_path / "a.wav", [sound], channels=2))
    assert np.abs(read - sound).max() < 1e-3


def test_a_wav_file_of_another_rate_is_refused_with_advice(tmp_path: Path) -> None:
    path = examples.write_wav(tmp_path / "a.wav", [examples.tone(0.1)], rate=44_100)
    with pytest.raises(SystemExit, match=r"44,100 samples a second.*ffmpeg"):
        speech.read_wav(path)


@given(arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_components_are_those_of_a_flood(mask: np.ndarray) -> None:
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(mask), strict=True)}
    wanted = []
    while left:
        group, edge = set(), [left.pop()]
        while edge:
            row, column = edge.pop()
            group.add((row, column))
            near = {(row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & left
            left -= near
            edge += near
        rows, columns = zip(*group, strict=True)
        wanted.append((min(columns), min(rows), max(columns) + 1, max(rows) + 1))
    assert sorted(text.components(mask)) == sorted(wanted)


def test_a_box_grows_around_the_core_of_its_line_and_stays_in_the_picture() -> None:
    probabilities = np.zeros((64, 128), np.float32)
    probabilities[20:30, 40:90] = 0.9
    probabilities[0:10, 0:20] = 0.9
    probabilities[50:60, 40:90] = 0.4
    probabilities[40:42, 10:12] = 0.9
    edge, box = text.find_boxes(probabilities, (256, 128))
    assert edge[:2] == (0, 0)
    assert box == (67, 27, 193, 73)


def test_boxes_come_as_they_are_read() -> None:
    right, left, below = (200, 12, 300, 42), (10, 10, 100, 40), (10, 50, 100, 80)
    assert text.in_order([below, right, left]) == [left, right, below]


def test_what_is_repeated_counts_once_unless_something_is_between() -> None:
    characters = ["", "a", "b", " "]
    scores = np.eye(4, dtype=np.float32)[[1, 1, 0, 1, 2, 2, 3, 0, 2]]
    assert text.decode(scores, characters) == ("aab b", 1.0)
    assert text.decode(np.eye(4, dtype=np.float32)[[0, 0]], characters) == ("", 0.0)
    assert text.decode(np.eye(4, dtype=np.float32)[[2, 2]], characters) == ("b", 1.0)


def test_pictures_of_any_size_become_sizes_that_the_model_takes() -> None:
    for size in ((900, 600), (30, 3000), (4000, 3000), (1, 1)):
        width, height = text.size_to_find(examples.blank(*size))
        assert width % 32 == height % 32 == 0
        assert min(width, height) >= 32
        assert max(width, height) <= 2016


def test_a_picture_is_blue_green_red_from_minus_one_to_one() -> None:
    picture = examples.blank(4, 4)
    picture.paste((255, 0, 0), (0, 0, 4, 4))
    array = text.as_input(picture, 2, 2)
    assert array.shape == (1, 3, 2, 2)
    assert array[0, :, 0, 0].tolist() == [-1, -1, 1]


def test_lines_share_a_batch_with_grey_behind_the_shorter() -> None:
    short, long = examples.blank(96, 48), examples.blank(480, 48)
    width = text.width_of([short, long])
    pixels = text.batch([short, long], width)
    assert pixels.shape == (2, 3, 48, 480)
    assert (pixels[0, :, :, :96] == 1).all()
    assert (pixels[0, :, :, 96:] == 0).all()
    assert (pixels[1] == 1).all()
    assert text.width_of([short]) == 320
