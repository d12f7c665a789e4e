"""Pages without a text layer are read, and nobody is hurt by what strangers call a picture."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DictionaryObject, NameObject, NumberObject, StreamObject

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError, NotFoundError, OverloadedError
from appliance.core.settings import Settings
from appliance.core.tensors import Datatype, Tensor, TensorRequest, TensorResult
from appliance.core.types import Priority
from appliance.retrieval import reading
from appliance.retrieval.parsing.document import ParsedDocument
from appliance.retrieval.parsing.parser import DocumentParser
from appliance.retrieval.parsing.protocol import LONGEST_SIDE, STRIDE
from appliance.retrieval.reading import FIND, READ, TURN, ReadingParser
from tests.retrieval.documents import draw_page, media_type, png_bomb, write_pdf

pytestmark = pytest.mark.anyio

DEADLINE_S = 60.0


class DarkIsText:
    """Models that take dark pixels for text, and read how wide a line is: `a` for each 100 pixels."""

    def __init__(self, missing: str = "", errors: dict[str, ApplianceError] | None = None) -> None:
        self.missing = missing
        self.errors = errors or {}
        self.asked: list[str] = []

    def card(self, model: str, version: str = "") -> Any:
        if model == self.missing:
            raise NotFoundError(f"There is no {model}.")
        signature = SimpleNamespace(inputs=[SimpleNamespace(name="x")])
        return SimpleNamespace(signature=signature, properties={"metadata.character": "a\nb"})

    async def infer(self, request: TensorRequest) -> TensorResult:
        assert request.priority is Priority.FLEX, "interactive work goes first"
        self.asked.append(request.model)
        if request.model in self.errors:
            raise self.errors[request.model]
        [given] = request.inputs
        array = given.array
        if request.model == FIND:
            found = (array[:, :1] < 0).astype(np.float32)
        elif request.model == TURN:
            found = np.tile(np.array([1, 0], np.float32), (len(array), 1))
        else:
            found = np.zeros((len(array), 40, 4), np.float32)
            found[:, :, 0] = 1
            for line, scores in zip(array, found, strict=True):
                scores[: 2 * (int((line != 0).any(axis=(0, 1)).sum()) // 100) : 2, 1] = 2
        return TensorResult(request.model, "1", [Tensor("y", Datatype.FP32, found)])


@pytest.fixture
async def pages() -> AsyncIterator[DocumentParser]:
    subject = DocumentParser(Settings(document_timeout_s=40.0))
    yield subject
    await subject.close()


async def parse(pages: DocumentParser, path: Path, models: DarkIsText | None = None) -> ParsedDocument:
    parser = ReadingParser(pages, models or DarkIsText())  # type: ignore[arg-type]
    async with asyncio.timeout(DEADLINE_S):
        return await parser.parse(path, path.name, media_type(path))


def bar(size: tuple[int, int] = (800, 800), box: tuple[int, int, int, int] = (100, 100, 740, 148)) -> Image.Image:
    page = Image.new("L", size, "white")
    page.paste(0, box)
    return page


def scan(path: Path, *pictures: Image.Image, rotation: int = 0) -> Path:
    """Write pictures as pages of a PDF."""
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    if rotation:
        writer = PdfWriter(clone_from=PdfReader(path))
        for page in writer.pages:
            page.rotate(rotation)
        writer.write(path)
    return path


def mixed(path: Path, folder: Path) -> Path:
    """Write a page with text, a scan, and a page with text."""
    writer = PdfWriter()
    text = PdfReader(write_pdf(folder / "text.pdf", ["The first page.", "The third page."]))
    writer.add_page(text.pages[0])
    writer.add_page(PdfReader(scan(folder / "scan.pdf", bar())).pages[0])
    writer.add_page(text.pages[1])
    writer.write(path)
    return path


async def test_scans_are_read_between_pages_with_text(pages: DocumentParser, tmp_path: Path) -> None:
    document = await parse(pages, mixed(tmp_path / "mixed.pdf", tmp_path))
    assert [(each.page, each.text) for each in document.blocks] == [
        (1, "The first page."),
        (2, "aa"),
        (3, "The third page."),
    ]
    assert document.pages_without_text == ()


@pytest.mark.parametrize("missing", [FIND, TURN, READ])
async def test_without_the_models_scans_are_refused_with_advice_and_text_is_taken(
    pages: DocumentParser, tmp_path: Path, missing: str
) -> None:
    models = DarkIsText(missing)
    with pytest.raises(InvalidRequestError, match=missing) as refused:
        await parse(pages, scan(tmp_path / "scan.pdf", bar()), models)
    assert refused.value.code == "unsupported_file"
    assert all(each in refused.value.advice for each in (f"appliance models pull {FIND}", TURN, READ))
    document = await parse(pages, mixed(tmp_path / "mixed.pdf", tmp_path), models)
    assert [each.page for each in document.blocks] == [1, 3]
    assert document.pages_without_text == (2,)
    assert models.asked == []


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("a.png", bar()),
        ("a.jpg", bar()),
        ("a.png", bar().convert("RGB")),
        ("a.png", bar().convert("P")),
        ("a.png", bar().convert("1")),
        ("a.png", bar().convert("RGBA")),
    ],
)
async def test_a_picture_of_any_kind_is_a_page(
    pages: DocumentParser, tmp_path: Path, name: str, picture: Image.Image
) -> None:
    picture.save(tmp_path / name)
    document = await parse(pages, tmp_path / name)
    assert [(each.page, each.text) for each in document.blocks] == [(1, "aa")]


async def test_what_can_be_seen_through_is_white(pages: DocumentParser, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (800, 800), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (100, 100, 740, 148))
    picture.save(tmp_path / "a.png")
    assert [each.text for each in (await parse(pages, tmp_path / "a.png")).blocks] == ["aa"]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
async def test_a_photograph_is_turned_as_its_camera_says(
    pages: DocumentParser, tmp_path: Path, orientation: int
) -> None:
    degrees = {1: 0, 3: 180, 6: 90, 8: 270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    bar().rotate(degrees, expand=True).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert [each.text for each in (await parse(pages, tmp_path / "a.jpg")).blocks] == ["aa"]


async def test_a_page_is_turned_as_its_file_says(pages: DocumentParser, tmp_path: Path) -> None:
    path = scan(tmp_path / "a.pdf", bar().rotate(90, expand=True), rotation=90)
    assert [each.text for each in (await parse(pages, path)).blocks] == ["aa"]


@pytest.mark.parametrize("size", [(17, 17), (100, 3000), (5000, 700), (1984, 1984), (800, 803)])
async def test_pictures_are_shown_in_sizes_that_the_models_take(
    pages: DocumentParser, tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("L", size, 200).save(tmp_path / "a.png")
    [picture] = await pages.show(tmp_path / "a.png", "a.png", "image/png", 1)
    assert all(side % STRIDE == 0 and STRIDE <= side <= LONGEST_SIDE for side in picture.shape)
    assert (picture == 200).all()


async def test_an_empty_page_is_refused_as_one_without_text(pages: DocumentParser, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no text that can be read") as refused:
        await parse(pages, scan(tmp_path / "a.pdf", Image.new("L", (800, 800), "white")))
    assert refused.value.code == "invalid_file"


def cut_png(path: Path) -> None:
    draw_page(["Some text"]).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-2000])


def bomb(path: Path) -> None:
    path.write_bytes(png_bomb())


def large_but_allowed_by_the_library(path: Path) -> None:
    path.write_bytes(png_bomb(9500))


def bomb_in_pdf(path: Path) -> None:
    picture = StreamObject()
    picture._data = zlib.compress(bytes(100_000_000))
    names = {"Type": "XObject", "Subtype": "Image", "ColorSpace": "DeviceGray", "Filter": "FlateDecode"}
    picture.update({NameObject(f"/{key}"): NameObject(f"/{value}") for key, value in names.items()})
    numbers = {"Width": 60_000, "Height": 60_000, "BitsPerComponent": 8}
    picture.update({NameObject(f"/{key}"): NumberObject(value) for key, value in numbers.items()})
    writer = PdfWriter()
    page = writer.add_blank_page(100, 100)
    pictures = DictionaryObject({NameObject("/a"): writer._add_object(picture)})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/XObject"): pictures})
    writer.write(path)


@pytest.mark.parametrize("make", [cut_png, bomb, large_but_allowed_by_the_library, bomb_in_pdf])
async def test_a_hostile_picture_is_refused_and_the_next_is_read(
    pages: DocumentParser, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "bad.bin"
    make(path)
    with pytest.raises(InvalidRequestError) as refused:
        await parse(pages, path)
    assert refused.value.code == "invalid_file"
    assert str(tmp_path) not in str(refused.value), "the client learns no path of the server"
    bar().save(tmp_path / "good.png")
    assert (await parse(pages, tmp_path / "good.png")).blocks


async def test_a_model_that_is_busy_lets_the_file_wait(pages: DocumentParser, tmp_path: Path) -> None:
    bar().save(tmp_path / "a.png")
    with pytest.raises(OverloadedError):
        await parse(pages, tmp_path / "a.png", DarkIsText(errors={READ: OverloadedError("full")}))


async def test_a_picture_that_a_model_fails_on_costs_no_other_page(pages: DocumentParser, tmp_path: Path) -> None:
    models = DarkIsText(errors={FIND: EngineError("broken")})
    document = await parse(pages, mixed(tmp_path / "mixed.pdf", tmp_path), models)
    assert [each.page for each in document.blocks] == [1, 3]
    assert document.pages_without_text == (2,)


async def test_too_many_scans_are_refused_before_any_is_read(
    pages: DocumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_PAGES", 1)
    models = DarkIsText()
    with pytest.raises(InvalidRequestError, match="2 pages without a text layer"):
        await parse(pages, scan(tmp_path / "a.pdf", bar(), bar()), models)
    assert models.asked == []


class BrokenPages:
    """Text on the first page, and 30 scans that bring the reader down."""

    def __init__(self, document: ParsedDocument) -> None:
        self.document = document
        self.shown = 0

    async def parse(self, path: Path, filename: str, media_type: str) -> ParsedDocument:
        return self.document

    async def show(self, path: Path, filename: str, media_type: str, page: int) -> list[Any]:
        self.shown += 1
        raise InvalidRequestError("It brought its reader down.", code="invalid_file")


async def test_a_document_that_brings_the_reader_down_again_and_again_is_given_up(tmp_path: Path) -> None:
    subject = BrokenPages(ParsedDocument((), "", tuple(range(1, 31))))
    with pytest.raises(InvalidRequestError, match="brought its reader down"):
        await ReadingParser(subject, DarkIsText()).parse(tmp_path, "a.pdf", "application/pdf")  # type: ignore[arg-type]
    assert subject.shown == reading.MOST_UNREADABLE
