"""Reading a picture, but for the models that do it (pure): where text is, what scores spell, what belongs together.

One model marks the pixels that are text, and boxes are put around them (differentiable binarization,
arxiv.org/abs/1911.08947); one tells which lines are upside down; one reads lines (CTC). Boxes stand upright. Pictures
are grey, shape (height, width), bytes from black to white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Grey: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom."""

TEXT_PIXEL, TEXT_BOX = 0.3, 0.5
"""Probabilities from which on a pixel, or a box or line on average, is text."""
UNCLIP = 1.6
"""The first model marks the core of each line; its box grows by so much of its area for each pixel of its edge."""
LEAST_BOX = 3
MOST_BOXES = 2000
"""Lines of one picture: a page of a telephone book has about 500."""
MOST_RUNS = 400_000
"""Rows of marked pixels; a picture of noise has more, and no text."""
LINE_HEIGHT, LINE_WIDTH, TURN_WIDTH = 48, 320, 192
LONGEST_LINE = 4096
"""Pixels of a line as it is read."""
UPSIDE_DOWN = 0.9
GAP = 0.9
"""A paragraph ends where the next line is farther away than so many heights of a line."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text: where it is, and what it says."""

    box: Box
    text: str


def as_input(picture: Grey) -> Floats:
    """Return a picture as the models want it: three equal colours from -1 to 1, shape (3, height, width)."""
    scaled = picture.astype(np.float32) / 127.5 - 1
    return np.broadcast_to(scaled, (3, *scaled.shape))


def find_boxes(probabilities: Floats) -> list[Box]:
    """Return a box around each line of text, in the order of reading; at most `MOST_BOXES`."""
    height, width = probabilities.shape
    boxes = []
    for left, top, right, bottom in components(probabilities > TEXT_PIXEL):
        wide, high = right - left, bottom - top
        if min(wide, high) < LEAST_BOX or probabilities[top:bottom, left:right].mean() < TEXT_BOX:
            continue
        margin = round(wide * high * UNCLIP / (2 * (wide + high)))
        boxes.append(
            (max(0, left - margin), max(0, top - margin), min(width, right + margin), min(height, bottom + margin))
        )
    return in_order(boxes[:MOST_BOXES])


def components(mask: NDArray[np.bool_]) -> list[Box]:
    """Return the box around each group of pixels that touch each other: runs of each row joined with those above."""
    parents: list[int] = []
    boxes: list[Box] = []
    above: list[tuple[int, int, int]] = []
    for row, pixels in enumerate(mask):
        edges = np.flatnonzero(np.diff(pixels.astype(np.int8), prepend=0, append=0)).tolist()
        here = []
        first = 0
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            run = len(parents)
            if run >= MOST_RUNS:
                return []
            parents.append(run)
            boxes.append((start, row, stop, row + 1))
            here.append((start, stop, run))
            while first < len(above) and above[first][1] < start:
                first += 1
            for other_start, _, other in above[first:]:
                if other_start > stop:
                    break
                _join(parents, boxes, run, other)  # corners touch too
        above = here
    return [box for run, box in enumerate(boxes) if parents[run] == run]


def _join(parents: list[int], boxes: list[Box], run: int, other: int) -> None:
    one, two = sorted((_root(parents, run), _root(parents, other)))
    if one != two:
        parents[two] = one
        boxes[one] = _around(boxes[one], boxes[two])


def _root(parents: list[int], run: int) -> int:
    while parents[run] != run:
        parents[run] = parents[parents[run]]
        run = parents[run]
    return run


def _around(one: Box, two: Box) -> Box:
    return min(one[0], two[0]), min(one[1], two[1]), max(one[2], two[2]), max(one[3], two[3])


def in_order(boxes: Sequence[Box]) -> list[Box]:
    """Sort boxes from top to bottom, and those side by side from left to right."""
    return [box for row in _rows(boxes) for box in row]


def _rows(boxes: Sequence[Box]) -> list[list[Box]]:
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda each: each[1] + each[3]):
        middle = (box[1] + box[3]) / 2
        if rows and rows[-1][0][1] < middle < rows[-1][0][3]:
            rows[-1].append(box)
        else:
            rows.append([box])
    return [sorted(row) for row in rows]


def cut(picture: Grey, box: Box) -> Floats:
    """Return a line of a picture in the height in which lines are read, and as wide as it is then."""
    left, top, right, bottom = box
    width = -(-LINE_HEIGHT * (right - left) // (bottom - top))
    return resized(picture[top:bottom, left:right], LINE_HEIGHT, min(max(width, 1), LONGEST_LINE))


def resized(picture: NDArray[np.generic], height: int, width: int) -> Floats:
    """Return a picture in another size, by linear interpolation between the middles of its pixels."""
    found = np.asarray(picture, np.float32)
    for axis, size in ((0, height), (1, width)):
        length = found.shape[axis]
        places = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = places.astype(np.int64)
        share = (places - low).astype(np.float32)
        share = share[:, np.newaxis] if axis == 0 else share
        above = np.take(found, np.minimum(low + 1, length - 1), axis)
        found = np.take(found, low, axis) * (1 - share) + above * share
    return found


def batch(lines: Sequence[Floats], width: int) -> Floats:
    """Return lines side by side as the models want them, shape (lines, 3, height, `width`), grey behind each.

    One that is wider is made as wide as that.
    """
    pixels = np.zeros((len(lines), 3, LINE_HEIGHT, width), np.float32)
    for row, line in zip(pixels, lines, strict=True):
        fitting = line if line.shape[1] <= width else resized(line, LINE_HEIGHT, width)
        row[:, :, : fitting.shape[1]] = fitting / 127.5 - 1
    return pixels


def width_of(lines: Sequence[Floats]) -> int:
    """Return the width in which the widest line is read."""
    return max(LINE_WIDTH, *(int(each.shape[1]) for each in lines))


def upright(lines: Sequence[Floats], scores: Floats) -> list[Floats]:
    """Return the lines with those turned around that are upside down, by scores of shape (lines, 2)."""
    return [each[::-1, ::-1] if score > UPSIDE_DOWN else each for each, score in zip(lines, scores[:, 1], strict=True)]


def spell(scores: Floats, characters: Sequence[str]) -> str:
    """Return what the scores of one line spell, shape (places, characters), or "" where that is not sure.

    A character that goes on over several places counts once, unless the sign for nothing, the first, is between.
    """
    best = scores.argmax(axis=1)
    counts = (best != 0) & (best != np.concatenate(([0], best[:-1])))
    if not counts.any() or scores.max(axis=1)[counts].mean() < TEXT_BOX:
        return ""
    return "".join(characters[each] for each in best[counts].tolist())


def paragraphs(lines: Sequence[Line]) -> list[str]:
    """Return the lines of a picture as paragraphs: what stands side by side is one line of text."""
    texts = {each.box: each.text.strip() for each in lines if each.text.strip()}
    found: list[list[str]] = []
    last: Box | None = None
    for row in _rows(list(texts)):
        whole = row[0]
        for box in row[1:]:
            whole = _around(whole, box)
        height = whole[3] - whole[1]
        if last is None or whole[1] - last[3] > GAP * min(height, last[3] - last[1]):
            found.append([])
        found[-1].append(" ".join(texts[box] for box in row))
        last = whole
    return ["\n".join(each) for each in found]
