"""Foreign text made safe to show on one line of a log or a terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    r"""Return the text with line breaks, control and invisible characters written as escapes such as `\n` or `\x1b`.

    So nobody's text forges a line of the log, drives the terminal or reverses the direction of writing. Letters of
    every script, emoji and spaces stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(each if _is_visible(each) else each.encode("unicode_escape").decode() for each in text)


def _is_visible(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"
