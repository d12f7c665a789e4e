"""Scans and pictures become text through models that read: `ocr` around the tensors of the ONNX engine.

    DocumentParser ─► text, and pages without any ─► the pictures of each ─► lines ─► blocks with their page

Without the models, a document's other pages are taken, and one that has no other is refused with advice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from appliance.core.errors import ApplianceError, InvalidRequestError, NotFoundError
from appliance.core.printable import printable
from appliance.core.tensors import Datatype, Tensor, TensorModels, TensorRequest
from appliance.core.types import Priority
from appliance.retrieval import ocr
from appliance.retrieval.ingest import PASSING
from appliance.retrieval.ocr import Floats, Grey, Line
from appliance.retrieval.parsing.document import Block, ParsedDocument

LOGGER = logging.getLogger("appliance.retrieval")

FIND, TURN, READ = "pp-ocrv6-det-small", "pp-ocr-cls-mobile", "pp-ocrv6-rec-small"
"""Models of the catalog: which pixels are text, what is upside down, what a line says."""

MOST_PAGES = 1000
"""Pages that are read of one document."""

MOST_UNREADABLE = 8
"""So many pages may bring the reader down before the document is given up: each may take its time limit."""

LINES_A_REQUEST = 6

ADVICE = f"Let it be read: appliance models pull {FIND}, then the same with {TURN} and {READ}, and add the file again."


class Pages(Protocol):
    """Whatever takes the text from files, and shows what stands on their pages."""

    async def parse(self, path: Path, filename: str, media_type: str) -> ParsedDocument:
        """Return the text of a file; see `parts.Parser`."""
        ...

    async def show(self, path: Path, filename: str, media_type: str, page: int) -> Sequence[Grey]:
        """Return the pictures of a page. Raises InvalidRequestError: they cannot be decoded."""
        ...


class ReadingParser:
    """A parser that reads what the other one finds no text on."""

    def __init__(self, pages: Pages, models: TensorModels) -> None:
        """Read with these; the models may come later, or never."""
        self._pages = pages
        self._models = models

    async def parse(self, path: Path, filename: str, media_type: str) -> ParsedDocument:
        """Return the text of a file; see `parts.Parser`.

        Raises:
            InvalidRequestError: As the other parser does; `unsupported_file`, there is nothing but pictures and the
                models are not installed; or `invalid_file`, there is nothing to be read on them.
        """
        document = await self._pages.parse(path, filename, media_type)
        if not document.pages_without_text:
            return document
        if missing := self._missing():
            if document.blocks:
                LOGGER.warning(
                    "%s: %d pages have no text layer and are left out, for there is no %s",
                    printable(filename),
                    len(document.pages_without_text),
                    missing,
                )
                return document
            raise InvalidRequestError(
                f"{printable(filename)} holds pictures and no text, and the model {missing} is not installed.",
                advice=ADVICE,
                code="unsupported_file",
                param="file",
            )
        return await self._read(document, path, filename, media_type)

    def _missing(self) -> str:
        for name in (FIND, TURN, READ):
            try:
                self._models.card(name)
            except NotFoundError:
                return name
        return ""

    async def _read(self, document: ParsedDocument, path: Path, filename: str, media_type: str) -> ParsedDocument:
        wanted = document.pages_without_text
        if len(wanted) > MOST_PAGES:
            raise InvalidRequestError(
                f"{printable(filename)} has {len(wanted):,} pages without a text layer; {MOST_PAGES:,} are read.",
                advice="Split it into several files.",
                code="invalid_file",
                param="file",
            )
        found: list[Block] = []
        unreadable: list[int] = []
        for page in wanted:
            try:
                pictures = await self._pages.show(path, filename, media_type, page)
            except InvalidRequestError as error:
                LOGGER.warning("page %d of %s is left out: %s", page, printable(filename), error)
                unreadable.append(page)
                if len(unreadable) == min(MOST_UNREADABLE, len(wanted)) and not document.blocks and not found:
                    raise
                if len(unreadable) >= MOST_UNREADABLE:
                    break
                continue
            found += [Block("paragraph", each, page) for each in await self._texts(pictures, page, filename)]
        blocks = sorted((*document.blocks, *found), key=lambda each: each.page or 0)
        if not blocks:
            raise InvalidRequestError(
                f"{printable(filename)} holds no text that can be read.",
                advice="Scan it upright, with 200 dpi or more.",
                code="invalid_file",
                param="file",
            )
        read = {each.page for each in found}
        return replace(document, blocks=tuple(blocks), pages_without_text=tuple(p for p in wanted if p not in read))

    async def _texts(self, pictures: Sequence[Grey], page: int, filename: str) -> list[str]:
        """Return the paragraphs on a page; a picture that a model fails on has none."""
        found: list[str] = []
        for each in pictures:
            try:
                found += ocr.paragraphs(await self._lines(each))
            except PASSING:
                raise
            except ApplianceError as error:
                LOGGER.warning("a picture on page %d of %s is left out: %s", page, printable(filename), error)
        return found

    async def _lines(self, picture: Grey) -> list[Line]:
        marked = await self._infer(FIND, ocr.as_input(picture)[np.newaxis])
        boxes = await asyncio.to_thread(ocr.find_boxes, marked[0, 0])
        found: list[Line] = []
        for first in range(0, len(boxes), LINES_A_REQUEST):
            some = boxes[first : first + LINES_A_REQUEST]
            lines = [ocr.cut(picture, each) for each in some]
            lines = ocr.upright(lines, await self._infer(TURN, ocr.batch(lines, ocr.TURN_WIDTH)))
            scores = await self._infer(READ, ocr.batch(lines, ocr.width_of(lines)))
            characters = self._characters()
            found += [Line(box, ocr.spell(each, characters)) for box, each in zip(some, scores, strict=True)]
        return found

    def _characters(self) -> list[str]:
        """Return what each score of a line stands for, as the publisher wrote it into the model's file."""
        written = self._models.card(READ).properties.get("metadata.character", "")
        return ["", *written.split("\n"), " "]

    async def _infer(self, model: str, array: Floats) -> Floats:
        """Run a model that has one input and one output, behind whoever waits for an answer."""
        signature = self._models.card(model).signature
        given = Tensor(signature.inputs[0].name, Datatype.FP32, np.ascontiguousarray(array))
        result = await self._models.infer(TensorRequest(model, "", [given], priority=Priority.FLEX))
        return np.asarray(result.outputs[0].array, np.float32)
