"""Where the end of a token sequence occurred before, and what followed it there: prompt lookup (pure).

Answers quote: a document that is summed up, code that is changed, their own words where they repeat. The index is that
of LZ77 coders: a table from each pair of tokens to its last occurrence, and a chain from each occurrence to the one
before it. A token costs one entry in each; a search looks at a few occurrences, however long the sequence is.

    tokens    the pump is loud if the pump is │ loud if …
              └ a match of three ┘            │ proposed, since it followed there

Source: A. Saxena, Prompt Lookup Decoding, 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

SHORTEST_MATCH = 2
LONGEST_MATCH = 16
"""Tokens that are compared; a longer match counts as one of this length."""
OCCURRENCES = 8
"""How many of the last occurrences of a pair are looked at."""
SLICE = 1024
"""Tokens indexed in one call, about a quarter of a millisecond, so that no step waits for a long prompt's index."""


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of the sequence's last `length` tokens; `end` is the place after it."""

    end: int
    length: int


class PromptLookup:
    """An index over one sequence, which may grow at its end only. Takes about 150 bytes a token."""

    def __init__(self, tokens: array[int]) -> None:
        """Index nothing yet; `tokens` is kept, and read as it grows."""
        self._tokens = tokens
        self._last: dict[int, int] = {}
        self._before = array("i", [0, 0])  # by place after the pair; 0 is none, since no pair ends there

    def catch_up(self) -> bool:
        """Index what is new, at most `SLICE` tokens of it; returns whether that was all."""
        tokens, last, before = self._tokens, self._last, self._before
        first = len(before)
        stop = min(len(tokens), first + SLICE)  # the last pair is what is looked for: it enters with the next token
        for end in range(first, stop):
            pair = tokens[end - 2] << 32 | tokens[end - 1]
            before.append(last.get(pair, 0))
            last[pair] = end
        return stop >= len(tokens)

    def find(self) -> Match | None:
        """Return the longest match of the sequence's end among the last occurrences of its last two tokens.

        Of matches of one length the latest counts.
        """
        tokens = self._tokens
        size = len(tokens)
        if size <= SHORTEST_MATCH:
            return None
        end = self._last.get(tokens[-2] << 32 | tokens[-1], 0)
        best, length = 0, 0
        for _ in range(OCCURRENCES):
            if not end or length == LONGEST_MATCH:
                break
            common = self._common(end, size)
            if common > length:
                best, length = end, common
            end = self._before[end]
        return Match(best, length) if length else None

    def propose(self, match: Match, count: int) -> array[int]:
        """Return `count` tokens as they followed a match; where it overlaps the end, they repeat themselves."""
        proposed = self._tokens[match.end : match.end + count]
        period = len(self._tokens) - match.end
        while len(proposed) < count:
            proposed.append(proposed[-period])
        return proposed

    def _common(self, end: int, size: int) -> int:
        """Return how many tokens before `end` equal those before `size`; the last two are known to."""
        tokens = self._tokens
        length = SHORTEST_MATCH
        while length < LONGEST_MATCH and length < end and tokens[end - length - 1] == tokens[size - length - 1]:
            length += 1
        return length
