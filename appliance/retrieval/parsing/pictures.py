"""The pictures in a file, as something that can be read: grey, upright, and of a size in which text is found well.

Used by the process that reads files alone: whoever decodes pictures of strangers must be able to die of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from pypdf import PdfReader

from appliance.retrieval.parsing import sniff
from appliance.retrieval.parsing.protocol import LONGEST_SIDE, MOST_PICTURES, STRIDE
from appliance.retrieval.parsing.writer import BlockWriter, InvalidError

SHORTEST_SIDE = 736
"""Pixels; a smaller picture is made larger, for text is found best in this size."""
MOST_PIXELS = 80_000_000
"""Of a picture as it is decoded: a page of 21 by 29 cm at 600 dpi has 35 million."""
LEAST_SIDE = 16
"""A smaller picture has no text."""
MOST_LOOKED_AT = 64
"""Pictures of a page, large and small."""


def read(path: Path, writer: BlockWriter) -> None:
    """Say that a picture is a page without a text layer; what can be read in it is read elsewhere."""
    with _opened(path):
        writer.without_text(1)


def show(path: Path, media_type: str, page: int) -> Iterator[Image.Image]:
    """Yield what there is to be seen on a page, each side a multiple of `STRIDE` and no longer than `LONGEST_SIDE`.

    Raises:
        InvalidError: A picture has too many pixels, or there is no such page.
        Exception: Whatever a library raises on what its author did not think of.
    """
    if media_type == sniff.PDF:
        with path.open("rb") as file:
            for number, each in enumerate(_of_page(file, page)):
                if number >= MOST_PICTURES:
                    return
                yield _ready(each)
    else:
        with _opened(path) as picture:
            picture.draft("L", (LONGEST_SIDE, LONGEST_SIDE))
            yield _ready(ImageOps.exif_transpose(picture))


def _opened(path: Path) -> Image.Image:
    try:
        picture = Image.open(path, formats=["PNG", "JPEG"])
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InvalidError("is no picture that can be decoded") from error
    _check(picture)
    return picture


def _of_page(file: object, number: int) -> Iterator[Image.Image]:
    reader = PdfReader(file, strict=False)  # type: ignore[arg-type]
    if reader.is_encrypted:
        reader.decrypt("")
    if not 1 <= number <= len(reader.pages):
        raise InvalidError(f"has no page {number}")
    page = reader.pages[number - 1]
    for each in page.images.keys()[:MOST_LOOKED_AT]:
        picture = page.images[each].image
        if picture is None or min(picture.size) < LEAST_SIDE:
            continue
        _check(picture)
        yield picture.rotate(-page.rotation, expand=True) if page.rotation else picture


def _check(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise InvalidError(
            f"has a picture of {width} x {height} pixels; {MOST_PIXELS:,} are allowed", "Save it in a smaller size."
        )


def _ready(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA", "P"):  # what can be seen through is seen on paper
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("L").resize(_size(picture), Image.Resampling.LANCZOS)


def _size(picture: Image.Image) -> tuple[int, int]:
    factor = max(1.0, SHORTEST_SIDE / min(picture.size))
    factor = min(factor, LONGEST_SIDE / max(picture.size))
    width, height = (min(max(STRIDE, round(side * factor / STRIDE) * STRIDE), LONGEST_SIDE) for side in picture.size)
    return width, height
