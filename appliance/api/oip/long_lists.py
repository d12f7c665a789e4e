"""Long lists of numbers are taken out of a request's JSON before it is decoded. Pure; may run in a thread.

A decoder that keeps a list as it is must still read every number, to find where it ends, and then the numbers are read
again to become a tensor. The end of a flat list is its first closing bracket, which is found a hundred times faster.
"""

from __future__ import annotations

import re

LEAST_BYTES = 4096
"""Shorter lists stay where they are."""

_KEY = b'"data"'
_LIST = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*\[')


def cut_lists(text: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Take long flat lists without strings out of the fields named `data`.

    In JSON `"data"` before a colon can only be a key, or the end of one, since a quote within a string is escaped. If
    the text is no JSON, so is the one without the lists, or else a list is no list of numbers.

    Returns:
        The text with a string in place of each list, and the lists by these strings, quotes included.
    """
    found = _long_lists(text)
    if not found:
        return text, {}
    kept, at = [], 0
    for begin, end in found:
        kept.append(text[at:begin])
        at = end
    kept.append(text[at:])
    name = b"list"
    while any(name in each for each in kept):
        name += b"_"
    marks = [b'"%s %d"' % (name, index) for index in range(len(found))]
    lists = {mark: text[begin:end] for mark, (begin, end) in zip(marks, found, strict=True)}
    return b"".join([kept[0], *(mark + rest for mark, rest in zip(marks, kept[1:], strict=True))]), lists


def _long_lists(text: bytes) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    at = text.find(_KEY)
    while at >= 0:
        at, match = at + len(_KEY), _LIST.match(text, at)
        if match is not None:
            begin = match.end() - 1
            end = text.find(b"]", begin) + 1
            if end - begin >= LEAST_BYTES and not any(text.find(each, begin + 1, end) >= 0 for each in (b"[", b'"')):
                found.append((begin, end))
                at = end
        at = text.find(_KEY, at)
    return found
