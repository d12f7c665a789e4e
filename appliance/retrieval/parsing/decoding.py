"""Bytes of unknown encoding become text; nothing fails, and the same bytes always give the same text."""

from __future__ import annotations

from appliance.retrieval.parsing.sniff import BYTE_ORDER_MARKS, wide_encoding

SAMPLE_BYTES = 64 * 1024
"""So much of what is not UTF-8 is looked at to tell its encoding."""

ENCODINGS = (
    "gb18030",
    "big5",
    "shift_jis",
    "euc_jp",
    "euc_kr",
    "cp1250",
    "cp1251",
    "cp1252",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "koi8_r",
    "iso8859_2",
)
"""What is looked for: the encodings of files that people still have; more of them only make mistakes likelier."""

_FALLBACK = "cp1252"


def decode(data: bytes, declared: str = "") -> str:
    """Return the text of some bytes.

    A byte order mark is believed, then UTF-8 if all is valid, then what the file declares if all is valid. Where some
    lines are UTF-8 and others are not, each is read as what it is. Else the encoding is guessed.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    if wide := wide_encoding(data):
        return data.decode(wide, errors="replace")
    for encoding in ("utf-8", declared):
        if (text := _strictly(data, encoding)) is not None:
            return text
    lines = data.split(b"\n")
    texts = [_strictly(line, "utf-8") for line in lines]
    valid = sum(not line.isascii() for line, text in zip(lines, texts, strict=True) if text is not None)
    foreign = [line for line, text in zip(lines, texts, strict=True) if text is None]
    if valid <= len(foreign) // 4:  # some valid lines are found by chance in what is no UTF-8 at all
        return _lenient(data, guess(data))
    encoding = guess(b"\n".join(foreign))
    return "\n".join(
        text if text is not None else _lenient(line, encoding) for line, text in zip(lines, texts, strict=True)
    )


def guess(data: bytes) -> str:
    """Return the likeliest encoding of bytes that are not UTF-8."""
    from charset_normalizer import from_bytes  # noqa: PLC0415  (most files are UTF-8)

    lines = [line for line in data[: 16 * SAMPLE_BYTES].split(b"\n") if not line.isascii()]
    sample = b"\n".join(lines)[:SAMPLE_BYTES] or data[:SAMPLE_BYTES]
    best = from_bytes(sample, cp_isolation=list(ENCODINGS), enable_fallback=False).best()
    return best.encoding if best is not None else _FALLBACK


def _strictly(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding) if encoding else None
    except (UnicodeDecodeError, LookupError, ValueError):
        return None


def _lenient(data: bytes, encoding: str) -> str:
    return data.decode(encoding, errors="replace")
