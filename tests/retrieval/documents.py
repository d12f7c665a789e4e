"""Files as people have them, and as nobody should, for tests."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from email.message import EmailMessage
from pathlib import Path

import docx
import openpyxl
from docx.oxml import parse_xml
from PIL import Image, ImageDraw, ImageFont

from appliance.retrieval.parsing import sniff
from appliance.retrieval.parsing.document import Block
from appliance.retrieval.parsing.process import take_text
from appliance.retrieval.parsing.protocol import End, Job, Pieces
from appliance.retrieval.parsing.sniff import SNIFFED_BYTES

WORDS = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def read(path: Path, max_characters: int = 1_000_000) -> tuple[list[Block], End]:
    """Read a file in this process, as the child does."""
    blocks: list[Block] = []
    text = ""

    def take(message: Pieces) -> None:
        nonlocal text
        for piece in message.pieces:
            text += piece.text
            if not piece.more:
                blocks.append(Block(piece.kind, text, piece.page, piece.level))
                text = ""

    end = take_text(Job(str(path), media_type(path), 60.0, max_characters), take)
    return blocks, end


def media_type(path: Path) -> str:
    with path.open("rb") as file:
        return sniff.sniff(file.read(SNIFFED_BYTES), path.name)


def seen(blocks: Sequence[Block]) -> list[tuple[str, str]]:
    """Return kind and text, headings with their level."""
    return [(f"h{each.level}" if each.level else each.kind, each.text) for each in blocks]


def write_pdf(
    path: Path, pages: Sequence[str | bytes], *, title: str = "", outline: Sequence[tuple[str, int]] = ()
) -> Path:
    """Write a PDF with a page for each text, of which "" is a picture; bytes are a page's content, deflated."""
    objects: list[bytes] = [b""] * 3
    kids, first = [], 0
    objects[2] = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    for page in pages:
        if isinstance(page, bytes):
            content, extra = page, b"/Filter /FlateDecode"
        else:
            lines = b"".join(b"(" + line.encode("latin-1") + b") Tj T*\n" for line in page.split("\n"))
            content, extra = b"BT /F1 12 Tf 14 TL 50 700 Td\n" + lines + b"ET", b""
        objects.append(b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), extra, content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(len(objects))
    if outline:
        first = len(objects) + 2
        entries = []
        for at, (name, number) in enumerate(outline):
            following = b"/Next %d 0 R" % (first + at + 1) if at + 1 < len(outline) else b""
            entries.append(
                b"<< /Title (%s) /Parent %d 0 R /Dest [%d 0 R /Fit] %s >>"
                % (name.encode(), first - 1, kids[number - 1], following)
            )
        objects.append(b"<< /Type /Outlines /First %d 0 R /Last %d 0 R >>" % (first, first + len(outline) - 1))
        objects += entries
    objects[0] = b"<< /Type /Catalog /Pages 2 0 R %s >>" % (b"/Outlines %d 0 R" % (first - 1) if outline else b"")
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(b"%d 0 R" % each for each in kids))
    objects.append(b"<< /Title (%s) >>" % title.encode())
    return _write_pdf_objects(path, objects)


def _write_pdf_objects(path: Path, objects: Sequence[bytes]) -> Path:
    out = io.BytesIO()
    out.write(b"%PDF-1.5\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    table = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(b"trailer << /Size %d /Root 1 0 R /Info %d 0 R >>\n" % (len(objects) + 1, len(objects)))
    out.write(b"startxref\n%d\n%%%%EOF\n" % table)
    path.write_bytes(out.getvalue())
    return path


def pdf_bomb(path: Path, unpacked: int = 2**31) -> Path:
    """Write a PDF whose page unpacks to so many bytes."""
    packer = zlib.compressobj(9)
    part = b"BT (a) Tj ET\n" * 80_000
    content = b"".join(packer.compress(part) for _ in range(unpacked // len(part))) + packer.flush()
    return write_pdf(path, [content])


def write_docx(path: Path) -> Path:
    """Write a document with all that is read from one."""
    document = docx.Document()
    document.core_properties.title = "Manual"
    document.add_heading("Pump", 0)
    document.add_heading("Setup", 1)
    document.add_paragraph("Turn it on.")
    document.add_paragraph("first", style="List Bullet")
    document.add_paragraph("second", style="List Bullet")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip(
        (each for row in table.rows for each in row.cells), ["Part", "Size", "Nut", "5"], strict=True
    ):
        cell.text = text
    document.add_heading("水泵", 2)
    paragraph = document.add_paragraph("Before ")
    paragraph._p.append(parse_xml(f'<w:ins xmlns:w="{WORDS}"><w:r><w:t>inserted</w:t></w:r></w:ins>'))
    paragraph._p.append(parse_xml(f'<w:del xmlns:w="{WORDS}"><w:r><w:delText>deleted</w:delText></w:r></w:del>'))
    controlled = (
        f'<w:sdt xmlns:w="{WORDS}"><w:sdtContent><w:p><w:r><w:t>Controlled</w:t></w:r></w:p></w:sdtContent></w:sdt>'
    )
    paragraph._p.addnext(parse_xml(controlled))
    document.save(str(path))
    return path


def docx_with(path: Path, body: bytes | str, *, size: int = 0) -> Path:
    """Write the least DOCX around a text part, which is followed by so many blanks."""
    data = body.encode() if isinstance(body, str) else body
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("word/document.xml", "w") as part:
        part.write(data)
        for _ in range(size // 2**20):
            part.write(b" " * 2**20)
    return path


def write_xlsx(path: Path) -> Path:
    """Write a book of two sheets."""
    book = openpyxl.Workbook()
    first = book.active
    assert first is not None
    first.title = "Parts"
    for row in (["Part", "Size"], ["Nut", 5], [None, None], ["Bolt", 2.5], ["Made", True]):
        first.append(row)
    book.create_sheet("Empty")
    book.create_sheet("更多").append(["水泵", None, "红"])
    book.save(path)
    return path


def write_mail(path: Path) -> Path:
    """Write a message in two forms with an attachment and a message in it."""
    inner = EmailMessage()
    inner["Subject"], inner["From"] = "Older", "c@example.org"
    inner.set_content("Inner text.")
    message = EmailMessage()
    message["From"], message["To"] = "Jörg <a@example.org>", "b@example.org"
    message["Subject"], message["Date"] = "Die Pumpe läuft 水泵", "Mon, 02 Mar 2026 10:00:00 +0000"
    message["Message-ID"] = "<1@example.org>"
    message.set_content("Plain text.\n\nSecond paragraph äöü.\n")
    message.add_alternative("<p>Rich text.</p>", subtype="html")
    message.add_attachment(b"\0\1", maintype="application", subtype="pdf", filename="Übersicht.pdf")
    message.add_attachment(inner)
    path.write_bytes(message.as_bytes())
    return path


def draw_page(lines: Sequence[str], size: tuple[int, int] = (1240, 1754), letters: int = 34) -> Image.Image:
    """Return a page as a scanner makes it, at 150 dpi: lines of text and nothing else."""
    page = Image.new("L", size, "white")
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        pen.text((120, 150 + 2 * number * letters), line, fill=20, font=ImageFont.load_default(letters))
    return page


def png_bomb(side: int = 60_000) -> bytes:
    """Return a small file that says it has a picture of billions of pixels."""

    def part(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(10_000_000))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")
