"""Finding a model's control tokens in text that must not hold any.

llama.cpp reads a rendered prompt with its control tokens (`<|im_end|>`, `[INST]`, …), and to it a message that
spells one out looks like the template's own. A text is suspicious if it holds a control token's text, or if
one could arise where it meets the template's text. (Not if the template wrote a control token around it, as in
`'<|' + message.role + '|>'`: that is how it is meant.) Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class Suspicion(IntEnum):
    """What a text from outside could do to the prompt's structure."""

    NONE = 0
    AT_AN_EDGE = 1
    """It begins or ends with a part of a control token."""
    WITHIN = 2
    """It holds a whole control token."""


class ControlTexts:
    """The texts of a vocabulary's control tokens, ready to be looked for.

    Looking takes time proportional to the text and not to the number of control tokens, of which some models
    have thousands.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        known = sorted({text for text in texts if text})
        self._pattern = re.compile(_alternatives(_tree(known))) if known else None
        self._longest = max((len(text) for text in known), default=0)
        self._beginnings = frozenset(text[:end] for text in known for end in range(1, len(text)))
        self._endings = frozenset(text[start:] for text in known for start in range(1, len(text)))
        self._folded = [(text, frozenset(text)) for text in {text.casefold() for text in known}]

    def __bool__(self) -> bool:
        return self._pattern is not None

    def suspicion(self, text: str) -> Suspicion:
        """Return what `text` could do, also if a template strips the whitespace around it."""
        if self._pattern is None or not text:
            return Suspicion.NONE
        if self._pattern.search(text):
            return Suspicion.WITHIN
        return Suspicion.AT_AN_EDGE if self._touches(text) or self._touches(text.strip()) else Suspicion.NONE

    def could_become(self, text: str) -> bool:
        """Return whether a template that drops characters or changes case could make `text` hold a control token."""
        folded = text.casefold()
        letters = frozenset(folded)
        return any(needed <= letters and _is_spread_over(each, folded) for each, needed in self._folded)

    def found_in(self, text: str) -> list[str]:
        """Return the control tokens in `text`, in order, the longest where several begin."""
        return self._pattern.findall(text) if self._pattern else []

    def crosses(self, text: str, position: int) -> bool:
        """Return whether a control token begins before `position` and ends after it."""
        if self._pattern is None:
            return False
        matches = (self._pattern.match(text, at) for at in range(max(0, position - self._longest + 1), position))
        return any(match is not None and match.end() > position for match in matches)

    def _touches(self, text: str) -> bool:
        lengths = range(1, min(self._longest, len(text) + 1))
        return any(text[-each:] in self._beginnings or text[:each] in self._endings for each in lengths)


def _is_spread_over(word: str, text: str) -> bool:
    """Return whether the characters of `word` come in `text` in this order, whatever is between them."""
    at = 0
    for character in word:
        at = text.find(character, at) + 1
        if at == 0:
            return False
    return True


Tree = dict[str, Any]
"""Characters to subtrees; the key "" marks the end of a text."""


def _tree(texts: Iterable[str]) -> Tree:
    root: Tree = {}
    for text in texts:
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return root


def _alternatives(node: Tree) -> str:
    """Return a regular expression for a tree: it prefers the longest text and never tries a character twice."""
    branches = []
    for character, below in node.items():
        if not character:
            continue
        chain = character
        while len(below) == 1 and "" not in below:  # one way on: no group needed
            ((character, below),) = below.items()  # noqa: PLW2901  (walks down the chain)
            chain += character
        rest = _alternatives(below) if below != {"": {}} else ""
        branches.append(re.escape(chain) + rest)
    group = f"(?:{'|'.join(branches)})"
    return f"{group}?" if "" in node else group
