"""Reading a picture without the models: boxes around marked pixels, lines in reading order, what scores spell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from appliance.retrieval import ocr
from appliance.retrieval.ocr import Box, Line

CHARACTERS = ["", "a", "b", "c", " "]


def flooded(mask: NDArray[np.bool_]) -> set[Box]:
    """Return the boxes of groups, found pixel by pixel."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    found = set()
    while left:
        group, waiting = set(), [left.pop()]
        while waiting:
            row, column = waiting.pop()
            group.add((row, column))
            near = {(row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & left
            left -= near
            waiting += near
        rows, columns = zip(*group, strict=True)
        found.add((min(columns), min(rows), max(columns) + 1, max(rows) + 1))
    return found


@given(mask=arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_a_box_is_around_each_group_of_pixels_that_touch(mask: NDArray[np.bool_]) -> None:
    assert set(ocr.components(mask)) == flooded(mask)


@pytest.mark.parametrize(
    "rows",
    [
        ["#.#", "#.#", "###"],  # two runs are joined from below
        ["###", "..#", "###", "#..", "###"],
        ["#..", ".#.", "..#"],  # corners touch
        ["#...#", "#.#.#", "#####"],
        ["##..##..##", "..##..##.."],
    ],
)
def test_winding_groups_are_one(rows: list[str]) -> None:
    mask = np.array([[each == "#" for each in row] for row in rows])
    assert ocr.components(mask) == [(0, 0, len(rows[0]), len(rows))]


def test_noise_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "MOST_RUNS", 100)
    mask = np.zeros((20, 20), bool)
    mask[:, ::2] = True
    assert ocr.components(mask) == []


def test_a_box_grows_around_what_is_marked_and_stays_in_the_picture() -> None:
    marked = np.zeros((64, 96), np.float32)
    marked[20:30, 10:50] = 0.9
    marked[0:8, 90:96] = 0.9
    marked[50:52, 10:60] = 0.9  # too thin
    marked[55:60, 70:90] = 0.4  # not sure enough
    assert ocr.find_boxes(marked) == [(87, 0, 96, 11), (4, 14, 56, 36)]


def test_lines_are_in_the_order_of_reading() -> None:
    assert ocr.in_order([(50, 32, 90, 42), (0, 60, 40, 70), (0, 30, 40, 40), (0, 0, 40, 10)]) == [
        (0, 0, 40, 10),
        (0, 30, 40, 40),
        (50, 32, 90, 42),
        (0, 60, 40, 70),
    ]
    assert ocr.in_order([]) == []


def test_a_line_is_cut_in_its_height_and_no_longer_than_allowed() -> None:
    picture = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    line = ocr.cut(picture, (10, 20, 110, 44))
    assert line.shape == (48, 200)
    assert line[0, 0] == pytest.approx(10, abs=0.5)
    assert line[-1, -1] == pytest.approx(109, abs=0.5)
    assert ocr.cut(np.zeros((3, 2000), np.uint8), (0, 0, 2000, 3)).shape == (48, ocr.LONGEST_LINE)


def test_resizing_keeps_a_slope_and_one_pixel() -> None:
    slope = np.linspace(0, 99, 100, dtype=np.float32)[np.newaxis]
    assert np.allclose(ocr.resized(slope, 1, 50)[0, 1:-1], np.arange(2.5, 97, 2), atol=1e-3)
    assert (ocr.resized(np.full((1, 1), 7, np.uint8), 3, 4) == 7).all()


def test_a_batch_is_as_wide_as_asked_for() -> None:
    short, long = np.zeros((48, 10), np.float32), np.full((48, 400), 255, np.float32)
    made = ocr.batch([short, long], 192)
    assert made.shape == (2, 3, 48, 192)
    assert (made[0, :, :, :10] == -1).all()
    assert (made[0, :, :, 10:] == 0).all()
    assert np.allclose(made[1], 1)
    assert (ocr.width_of([short]), ocr.width_of([short, long])) == (320, 400)
    assert ocr.as_input(np.full((2, 3), 255, np.uint8)).tolist() == np.ones((3, 2, 3)).tolist()


def test_only_what_is_surely_upside_down_is_turned() -> None:
    line = np.arange(6, dtype=np.float32).reshape(2, 3)
    first, second = ocr.upright([line, line], np.array([[0.2, 0.8], [0.01, 0.99]], np.float32))
    assert (first == line).all()
    assert (second == line[::-1, ::-1]).all()


def scores(*places: int, sure: float = 0.9) -> NDArray[np.float32]:
    found = np.full((len(places), len(CHARACTERS)), (1 - sure) / 4, np.float32)
    found[range(len(places)), places] = sure
    return found


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ((1, 2, 3), "abc"),
        ((0, 1, 1, 1, 0, 0, 2), "ab"),
        ((1, 0, 1), "aa"),
        ((1, 4, 1), "a a"),
        ((0, 0), ""),
        ((3,), "c"),
        ((1, 2, 1), "aba"),
    ],
)
def test_a_character_that_goes_on_counts_once(places: tuple[int, ...], text: str) -> None:
    assert ocr.spell(scores(*places), CHARACTERS) == text


def test_a_line_that_is_not_sure_is_none() -> None:
    assert ocr.spell(scores(1, 2, sure=0.4), CHARACTERS) == ""


@given(places=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_what_is_spelled_is_what_ctc_defines(places: list[int]) -> None:
    kept = [each for at, each in enumerate(places) if each and (at == 0 or places[at - 1] != each)]
    assert ocr.spell(scores(*places), CHARACTERS) == "".join(CHARACTERS[each] for each in kept)


def test_near_lines_are_a_paragraph_and_what_stands_side_by_side_is_a_line() -> None:
    lines = [
        Line((0, 0, 40, 10), "Pump"),
        Line((50, 1, 90, 11), " 3 "),
        Line((0, 14, 90, 24), "needs oil."),
        Line((0, 26, 90, 36), "  "),
        Line((0, 60, 90, 70), "Next."),
    ]
    assert ocr.paragraphs(lines) == ["Pump 3\nneeds oil.", "Next."]
    assert ocr.paragraphs([]) == []
