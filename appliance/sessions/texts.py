"""What of an item is read by a person, for search, and the passage of it in which a question's words stand. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from appliance.core.words import passage_terms

PASSAGE = 240
"""Characters."""

MOST_INDEXED = 100_000
"""Characters of one item that can be found: more is a file, and belongs to a vector store."""

_PLAIN = ("name", "arguments", "output", "error")
"""Fields of calls and their results that are text, and in some items something else."""


def text_of(item: Mapping[str, Any]) -> str:
    """Return the words of an item, one paragraph a part."""
    return "\n\n".join(part for part in _parts(item) if part)[:MOST_INDEXED]


def _parts(item: Mapping[str, Any]) -> Iterator[str]:
    for field in ("content", "summary", "output"):
        value = item.get(field)
        if field == "content" and isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (_text(part) for part in value)
    for field in _PLAIN:
        value = item.get(field)
        if isinstance(value, str):
            yield value


def _text(part: object) -> str:
    if not isinstance(part, Mapping):
        return ""
    found = part.get("text", part.get("refusal", ""))
    return found if isinstance(found, str) else ""


def passage(text: str, terms: frozenset[str]) -> str:
    """Return the piece of a text in which most of the terms stand, the first of equals."""
    if len(text) <= PASSAGE:
        return text
    starts = range(0, len(text) - PASSAGE // 2, PASSAGE // 2)
    best = max(starts, key=lambda start: (len(terms.intersection(passage_terms(_piece(text, start)))), -start))
    return _piece(text, best).strip()


def _piece(text: str, start: int) -> str:
    return text[start : start + PASSAGE]
