"""Text to the terms that the keyword indexes know: the same for a passage and for a question.

Letters are compared without width, case or form (NFKC, case folding), English words by their stem. Scripts that put
no blanks between words are cut into pairs of neighbouring characters, each character a term too, so that a question
of one character finds something. A part number is a term as a whole and in its parts: `XR-4500/b` is found by
`xr4500b`, by `XR-4500` and by `4500`. Emoji, punctuation and marks of direction are no terms.

Whoever changes what this returns counts `VERSION` up: an index made with other terms is made anew.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import Stemmer

VERSION = 1

LONGEST_TERM = 64
"""Characters; what is longer is no word (a key, an encoded picture), and only its start counts."""

_STOP_WORDS = """
a about above after again against all am an and any are as at be because been before being below between both but
by can could did do does doing down during each few for from further had has have having he her here hers herself
him himself his how i if in into is it its itself me more most my myself no nor not of off on once only or other
our ours ourselves out over own same she should so some such than that the their theirs them themselves then there
these they this those through to too under until up very was we were what when where which while who whom why will
with would you your yours yourself yourselves
"""
"""They tell little, so a question's are left out unless it has no other words. Passages keep theirs."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf"
_UNSPACED += "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U0001b000-\U0001b16f"
_UNSPACED += "\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Hangul, kana, bopomofo and Han."""

_WITH_MARKS = (*range(0x300, 0x1E00), *range(0xA66F, 0xABF0))
_MARKS = "".join(chr(code) for code in _WITH_MARKS if unicodedata.category(chr(code))[0] == "M")
_HYPHEN = re.compile("[\u2010-\u2013\u2212]")
_INVISIBLE = re.compile("[\u00ad\u0640\u180e\u200c-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]")
"""Soft hyphens, the Arabic stretch, joiners and marks of direction: they are inside words and are not written."""

_LETTER = rf"(?:[^\W_]|[{_MARKS}])"
_TOKEN = re.compile(
    rf"(?P<unspaced>[{_UNSPACED}]+)|(?:(?![{_UNSPACED}]){_LETTER})+(?:[-./:_+',](?:(?![{_UNSPACED}]){_LETTER})+)*"
)
_ASCII_TOKEN = re.compile(r"[a-z0-9]+(?:[-./:_+',][a-z0-9]+)*")
_JOINT = re.compile(r"[-./:_+,]")
_BORDER = re.compile(r"(?<=\d)(?=[^\W\d_])|(?<=[^\W\d_])(?=\d)")
_HAS_DIGIT = re.compile(r"\d")


def passage_terms(text: str) -> list[str]:
    """Return all terms of a passage, one for each time that it occurs."""
    return list(_terms(text, alone=True))


def query_terms(text: str) -> list[str]:
    """Return the terms to search for, each once, in the order of the question."""
    every = list(dict.fromkeys(_terms(text, alone=False)))
    return [term for term in every if term not in _STOP_TERMS] or every


def _terms(text: str, *, alone: bool) -> Iterator[str]:
    """Yield terms; `alone` says whether the characters of a run of unspaced script are terms beside their pairs."""
    if text.isascii():
        for found in _ASCII_TOKEN.findall(text.lower()):
            yield from _word_terms(found)
        return
    for match in _TOKEN.finditer(_folded(text)):
        if match["unspaced"]:
            yield from _unspaced_terms(match[0], alone=alone)
        else:
            yield from _word_terms(match[0])


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _HYPHEN.sub("-", _INVISIBLE.sub("", folded)).replace("’", "'")


def _unspaced_terms(run: str, *, alone: bool) -> Iterator[str]:
    if alone or len(run) == 1:
        yield from run
    for start in range(len(run) - 1):
        yield run[start : start + 2]


def _word_terms(word: str) -> tuple[str, ...]:
    """Return the terms of a word, or of several that signs join."""
    return _known_word_terms(word) if len(word) <= LONGEST_TERM else _new_word_terms(word)


def _new_word_terms(word: str) -> tuple[str, ...]:
    if word.isalpha():
        return (_stem(word),)
    parts = [part for part in _JOINT.split(word) if part]
    if not _HAS_DIGIT.search(word):
        return tuple(_stem(part) for part in parts)
    return _number_terms(word, parts)


def _number_terms(word: str, parts: list[str]) -> tuple[str, ...]:
    """Return a part number or a number as a whole, and what it is made of: each term once."""
    pieces = [piece for part in parts for piece in _BORDER.split(part)]
    has_letter = any(not piece[0].isdigit() for piece in pieces)
    whole = "".join(parts) if has_letter else word
    return tuple(dict.fromkeys(term[:LONGEST_TERM] for term in (whole, *parts, *map(_stem, pieces))))


_known_word_terms = lru_cache(maxsize=1 << 17)(_new_word_terms)
"""Most words come again soon."""


def _stem(word: str) -> str:
    # A stemmer has state of its own and several threads may be here, so each call makes one: it costs 1 µs.
    return str(Stemmer.Stemmer("english", 0).stemWord(word[:LONGEST_TERM]))


_STOP_TERMS = frozenset(_stem(word) for word in _STOP_WORDS.split())
