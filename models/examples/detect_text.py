"""Read the text in a picture: a camera's image through three models of PP-OCR on an appliance.

    appliance models pull pp-ocrv6-det-small
    appliance models pull pp-ocrv6-rec-small
    appliance models pull pp-ocr-cls-mobile
    pip install 'tritonclient[http]' numpy pillow
    python detect_text.py picture.jpg

The first model marks the pixels that are text; boxes are put around them (differentiable binarization,
arxiv.org/abs/1911.08947). The second tells which lines are upside down. The third reads them (CTC). Boxes stand
upright: text that is rotated by more than a few degrees wants the picture rotated first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

SHORTEST_SIDE, LONGEST_SIDE, STRIDE = 736, 2000, 32
"""Sizes in pixels that text is found best in, and what each side must be a multiple of."""
TEXT_PIXEL, TEXT_BOX = 0.3, 0.5
"""Probabilities from which on a pixel, or a box on average, is text."""
UNCLIP = 1.6
"""The first model marks the core of each line; its box grows by so much of its area for each pixel of its edge."""
LEAST_BOX = 3
LINE_HEIGHT, LINE_WIDTH, TURN_WIDTH = 48, 320, 192
UPSIDE_DOWN = 0.9
LINES_A_REQUEST = 6


@dataclass(frozen=True)
class Line:
    """One line of text: where in the picture it is, what it says, and how sure that is."""

    box: tuple[int, int, int, int]
    text: str
    score: float


class Models:
    """The three models on the server."""

    def __init__(self, client: Any, *, find: str, turn: str, read: str) -> None:
        self._client = client
        self._find, self._turn, self._read = find, turn, read

    def read(self, picture: Image.Image) -> list[Line]:
        """Return the lines of text in a picture, from top to bottom and from left to right."""
        picture = picture.convert("RGB")
        boxes = find_boxes(self._infer(self._find, as_input(picture, *size_to_find(picture)))[0, 0], picture.size)
        lines = [picture.crop(box) for box in boxes]
        found: list[Line] = []
        for start in range(0, len(lines), LINES_A_REQUEST):
            some = slice(start, start + LINES_A_REQUEST)
            upright = self._turned(lines[some])
            scores = self._infer(self._read, batch(upright, width_of(upright)))
            characters = self._characters()
            found += [Line(box, *decode(each, characters)) for box, each in zip(boxes[some], scores, strict=True)]
        return [each for each in found if each.text and each.score >= TEXT_BOX]

    def _characters(self) -> list[str]:
        """Return what each score of a line stands for; the server tells it of a model that has been used."""
        written = self._client.get_model_metadata(self._read)["parameters"]["metadata.character"]
        return ["", *written.splitlines(), " "]  # the first stands for nothing

    def _turned(self, lines: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the lines with those that are upside down turned around."""
        upside_down = self._infer(self._turn, batch(lines, TURN_WIDTH))[:, 1] > UPSIDE_DOWN
        return [each.rotate(180) if down else each for each, down in zip(lines, upside_down, strict=True)]

    def _infer(self, model: str, array: Floats) -> Floats:
        """Run a model that has one input and one output."""
        given = triton.InferInput("x", list(array.shape), "FP32")
        given.set_data_from_numpy(array)
        result = self._client.infer(model, [given])
        answer: Floats = result.as_numpy(result.get_response()["outputs"][0]["name"])
        return answer


def size_to_find(picture: Image.Image) -> tuple[int, int]:
    """Return the width and height in which text is looked for."""
    factor = max(1.0, SHORTEST_SIDE / min(picture.size))
    factor = min(factor, LONGEST_SIDE / max(picture.size))
    width, height = (max(STRIDE, round(side * factor / STRIDE) * STRIDE) for side in picture.size)
    return width, height


def as_input(picture: Image.Image, width: int, height: int) -> Floats:
    """Return a picture as the models want it: blue, green, red from -1 to 1, shape (1, 3, height, width)."""
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return np.ascontiguousarray((pixels[:, :, ::-1] / 127.5 - 1).transpose(2, 0, 1)[np.newaxis])


def find_boxes(probabilities: Floats, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Return a box (left, top, right, bottom) in pixels of the picture around each line, in the order of reading."""
    height, width = probabilities.shape
    boxes = []
    for left, top, right, bottom in components(probabilities > TEXT_PIXEL):
        wide, high = right - left, bottom - top
        if min(wide, high) < LEAST_BOX or probabilities[top:bottom, left:right].mean() < TEXT_BOX:
            continue
        margin = wide * high * UNCLIP / (2 * (wide + high))
        across, down = size[0] / width, size[1] / height
        box = (
            max(0, round((left - margin) * across)),
            max(0, round((top - margin) * down)),
            min(size[0], round((right + margin) * across)),
            min(size[1], round((bottom + margin) * down)),
        )
        boxes.append(box)
    return in_order(boxes)


def components(mask: NDArray[np.bool_]) -> list[tuple[int, int, int, int]]:
    """Return the box around each group of pixels that touch each other: runs of each row joined with those above."""
    parents: list[int] = []
    boxes: list[tuple[int, int, int, int]] = []

    def root(run: int) -> int:
        while parents[run] != run:
            run = parents[run]
        return run

    above: list[tuple[int, int, int]] = []
    for row, pixels in enumerate(mask):
        edges = np.flatnonzero(np.diff(pixels.astype(np.int8), prepend=0, append=0))
        here = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            run = len(parents)
            parents.append(run)
            boxes.append((start, row, stop, row + 1))
            here.append((start, stop, run))
            for other_start, other_stop, other in above:
                if other_start <= stop and start <= other_stop:  # corners touch too
                    one, two = sorted((root(run), root(other)))
                    if one != two:
                        parents[two] = one
                        boxes[one] = around(boxes[one], boxes[two])
        above = here
    return [box for run, box in enumerate(boxes) if parents[run] == run]


def around(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the box around two boxes."""
    return min(one[0], two[0]), min(one[1], two[1]), max(one[2], two[2]), max(one[3], two[3])


def in_order(boxes: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Sort boxes from top to bottom, and those side by side from left to right."""
    rows: list[list[tuple[int, int, int, int]]] = []
    for box in sorted(boxes, key=lambda each: each[1] + each[3]):
        middle = (box[1] + box[3]) / 2
        if rows and rows[-1][0][1] < middle < rows[-1][0][3]:
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row)]


def width_of(lines: Sequence[Image.Image]) -> int:
    """Return the width in which the widest line is read."""
    return max(LINE_WIDTH, *(-(-LINE_HEIGHT * each.width // each.height) for each in lines))


def batch(lines: Sequence[Image.Image], width: int) -> Floats:
    """Return lines of one height, each as wide as it is then but at most `width`, and grey behind that."""
    pixels = np.zeros((len(lines), 3, LINE_HEIGHT, width), np.float32)
    for row, line in zip(pixels, lines, strict=True):
        own = min(width, -(-LINE_HEIGHT * line.width // line.height))
        row[:, :, :own] = as_input(line, own, LINE_HEIGHT)[0]
    return pixels


def decode(scores: Floats, characters: Sequence[str]) -> tuple[str, float]:
    """Return the text that the scores of one line spell, shape (places, characters), and how sure it is on average.

    A character that goes on over several places counts once, unless the sign for nothing is between.
    """
    best = scores.argmax(axis=1)
    counts = (best != 0) & (best != np.roll(best, 1))
    counts[0] = best[0] != 0
    text = "".join(characters[each] for each in best[counts])
    return text, float(scores.max(axis=1)[counts].mean()) if text else 0.0


def main() -> None:
    """Print the text in a picture."""
    parser = argparse.ArgumentParser(description="Read the text in a picture, with PP-OCR on an appliance.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--server", default="127.0.0.1:8080", help="address of the appliance")
    parser.add_argument("--find", default="pp-ocrv6-det-small", help="model that finds text")
    parser.add_argument("--turn", default="pp-ocr-cls-mobile", help="model that tells what is upside down")
    parser.add_argument("--read", default="pp-ocrv6-rec-small", help="model that reads a line")
    arguments = parser.parse_args()
    with (
        triton.InferenceServerClient(arguments.server, network_timeout=60.0) as client,
        Image.open(arguments.file) as picture,
    ):
        models = Models(client, find=arguments.find, turn=arguments.turn, read=arguments.read)
        for line in models.read(picture):
            left, top, right, bottom = line.box
            print(f"{line.score:.2f}  {left:5} {top:5} {right:5} {bottom:5}  {line.text}")


if __name__ == "__main__":
    main()
