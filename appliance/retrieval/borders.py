"""Where a text may be cut: between sentences, clauses, lines or words, in English, Chinese and their like.

Every pattern looks at each character a bounded number of times, however a hostile text is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Span = tuple[int, int]
"""From the first character to the next span's first, in characters of the text; the white space between is its last."""

_ENDS = ".!?"
_WIDE_ENDS = "。！？；…｡؟۔।॥"
_CLOSING = "\"'”’」』）】》)\\]"
_SENTENCE = re.compile(
    rf"(?<![{_ENDS}])[{_ENDS}]++[{_CLOSING}]*+\s(?!\s*+[a-z])|(?<![{_WIDE_ENDS}])[{_WIDE_ENDS}]++[{_CLOSING}]*+"
)
_CLAUSE = re.compile(r"[,;:](?=\s)|[，、：—]|\n")
_LINE = re.compile(r"\n")
_BLANKS = (" ", "\n", "\t", "\u3000")


def sentences(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield a part of a text in sentences; the end of a line alone ends none."""
    return _between(_SENTENCE, text, start, end)


def clauses(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield a part of a text in clauses and lines."""
    return _between(_CLAUSE, text, start, end)


def lines(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield a part of a text in lines."""
    return _between(_LINE, text, start, end)


def pieces(text: str, start: int, end: int, size: int) -> Iterator[Span]:
    """Yield a part of a text in pieces of up to `size` characters, between words where there is a blank near."""
    while end - start > size:
        border = start + size
        near = max(text.rfind(blank, start + size - size // 4, border) for blank in _BLANKS)
        border = near + 1 if near >= 0 else border
        yield start, border
        start = border
    yield start, end


def trimmed(text: str, start: int, end: int) -> Span:
    """Return a span without the white space at its ends; of nothing else, an empty one."""
    part = text[start:end]
    bare = part.lstrip()
    start += len(part) - len(bare)
    return start, start + len(bare.rstrip())


def _between(border: re.Pattern[str], text: str, start: int, end: int) -> Iterator[Span]:
    for found in border.finditer(text, start, end):
        if found.end() < end:
            yield start, found.end()
            start = found.end()
    yield start, end
