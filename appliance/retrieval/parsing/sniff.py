"""What a file is, by its first bytes; its name decides only between kinds of text that look alike."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from pathlib import PurePath

SNIFFED_BYTES = 64 * 1024
"""How much of a file's beginning is looked at."""

PLAIN = "text/plain"
MARKDOWN = "text/markdown"
HTML = "text/html"
CSV = "text/csv"
TSV = "text/tab-separated-values"
JSON = "application/json"
JSON_LINES = "application/x-ndjson"
MAIL = "message/rfc822"
PDF = "application/pdf"
ZIP = "application/zip"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
PNG = "image/png"
JPEG = "image/jpeg"
BINARY = "application/octet-stream"

PARSED = frozenset({PLAIN, MARKDOWN, HTML, CSV, TSV, JSON, JSON_LINES, MAIL, PDF, DOCX, XLSX, PNG, JPEG})
"""Types that text can be taken from."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""What a text may begin with, and the encoding that it says; UTF-32's begins as UTF-16's does, so it comes first."""

_PDF_WITHIN = 1024
_PARTS = ((b"word/document", DOCX), (b"xl/workbook", XLSX), (b"xl/worksheets/", XLSX), (b"word/", DOCX))
_BY_SUFFIX = {
    ".md": MARKDOWN,
    ".markdown": MARKDOWN,
    ".csv": CSV,
    ".tsv": TSV,
    ".tab": TSV,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
}
_HTML = re.compile(
    r"\s*(?:<\?xml[^>]*\?>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|title|meta|div|table|h[1-6]|p)\b",
    re.IGNORECASE | re.DOTALL,
)
_MAIL_NAMES = frozenset(
    (
        "from",
        "to",
        "cc",
        "subject",
        "date",
        "message-id",
        "received",
        "return-path",
        "mime-version",
        "delivered-to",
        "content-type",
        "reply-to",
        "x-mailer",
        "sender",
        "dkim-signature",
        "authentication-results",
        "content-transfer-encoding",
    )
)
_MARKDOWN = (
    re.compile(r"^#{1,6} \S", re.MULTILINE),
    re.compile(r"^(?:```|~~~)", re.MULTILINE),
    re.compile(r"^ {0,3}(?:[-*+]|\d+[.)]) \S", re.MULTILINE),
    re.compile(r"\[[^\]\n]+\]\([^)\s]+\)"),
    re.compile(r"(?<!\w)(?:\*\*\S[^*\n]*\*\*|`[^`\n]+`)"),
    re.compile(r"^\|?(?: *:?-{3,}:? *\|)+", re.MULTILINE),
)
_CONTROLS = frozenset(range(32)) - {7, 8, 9, 10, 11, 12, 13, 27}
_MOST_CONTROLS = 0.02
_FEW_CONTROLS = 4


def sniff(start: bytes, filename: str) -> str:
    """Return the media type of a file.

    Args:
        start: Its first 64 KiB; of a shorter file, all of it.
        filename: As its owner calls it. A wrong extension is harmless: the bytes decide wherever they can.
    """
    start = start[:SNIFFED_BYTES]
    if b"%PDF-" in start[:_PDF_WITHIN]:
        return PDF
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _zip_type(start)
    text = beginning(start)
    if text is None:
        return _binary_type(start)
    return _text_type(text, len(start) == SNIFFED_BYTES, PurePath(filename).suffix.lower())


def beginning(start: bytes) -> str | None:
    """Return the text that a file begins with, roughly decoded, or None if it is none."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return start.decode(encoding, errors="ignore")
    if wide := wide_encoding(start):
        return start.decode(wide, errors="ignore")
    if _has_many_controls(start):
        return None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        # A picture's first bytes may be few and plain; what some library knows to be no text is none.
        return None if _known(start) else start.decode("latin-1")
    return start.decode("utf-8", errors="ignore")


def _has_many_controls(data: bytes) -> bool:
    return sum(data.count(each) for each in _CONTROLS) > max(_FEW_CONTROLS, _MOST_CONTROLS * len(data))


def wide_encoding(start: bytes) -> str:
    """Return the byte order of UTF-16 without a mark, seen by the zeros of its ASCII characters, or ""."""
    sample = start[: 4096 // 2 * 2]
    pairs = len(sample) // 2
    if pairs < 2:
        return ""
    first, second = sample[::2], sample[1::2]
    for zeros, others, encoding in ((second, first, "utf-16-le"), (first, second, "utf-16-be")):
        if zeros.count(0) > 0.4 * pairs and not _has_many_controls(others):
            return encoding
    return ""


def _zip_type(start: bytes) -> str:
    """Tell office files by the names of the parts that come first; the whole list stands at the file's end."""
    found = [(at, kind) for name, kind in _PARTS if (at := start.find(name)) >= 0]
    return min(found)[1] if found else ZIP


def _binary_type(start: bytes) -> str:
    return _known(start) or BINARY


def _known(start: bytes) -> str:
    import filetype  # noqa: PLC0415  (only files that are no text need it)

    found = filetype.guess(start)
    return str(found.mime) if found is not None else ""


def _text_type(text: str, is_cut: bool, suffix: str) -> str:
    text = text.lstrip("\ufeff")
    if _HTML.match(text):
        return HTML
    if kind := _json_type(text, is_cut):
        return kind
    if _is_mail(text):
        return MAIL
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if kind := _table_type(text, is_cut):
        return kind
    return MARKDOWN if sum(bool(each.search(text)) for each in _MARKDOWN) >= 3 else PLAIN


def _json_type(text: str, is_cut: bool) -> str:
    text = text.strip()
    if not text or text[0] not in "{[":
        return ""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        seems_cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
        return JSON if is_cut and seems_cut else ""
    except RecursionError:
        return JSON
    rest = text[end:]
    if not rest:
        return JSON
    return JSON_LINES if rest.lstrip(" \t\r").startswith("\n") and rest.lstrip()[0] in '{["' else ""


def _is_mail(text: str) -> bool:
    head = re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]
    lines = [line for line in head.splitlines() if line[:1] not in (" ", "\t")]
    if lines and lines[0].startswith("From "):
        lines = lines[1:]
    names = [re.match(r"([\w-]+):", line) for line in lines]
    if not names or None in names:
        return False
    known = {each[1].lower() for each in names if each} & _MAIL_NAMES
    return len(known) >= 3 and bool(known & {"from", "date", "message-id", "received", "return-path"})


def _table_type(text: str, is_cut: bool) -> str:
    """Tell tables by lines of which each has the same number of fields."""
    lines = text.splitlines()[: 50 if is_cut else None]
    for delimiter, fewest, kind in (("\t", 2, TSV), (",", 3, CSV), (";", 3, CSV)):
        try:
            rows = list(csv.reader(io.StringIO("\n".join(lines[:50])), delimiter=delimiter))
        except csv.Error:
            continue
        widths = {len(row) for row in rows if row}
        if len(rows) >= 3 and len(widths) == 1 and min(widths) >= fewest and not _reads_as_prose(rows):
            return kind
    return ""


def _reads_as_prose(rows: list[list[str]]) -> bool:
    """Return True if a blank follows most commas, as in sentences."""
    later = [cell for row in rows for cell in row[1:]]
    return sum(cell.startswith(" ") for cell in later) > len(later) / 2
