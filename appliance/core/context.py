"""What of a long history a model is shown: the terms of the policy, for those who carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.core.sessions import Item


@dataclass(frozen=True, slots=True)
class Span:
    """Items that stay or go together: from a user's message to before the next one that no open call spans.

    Attributes:
        first: Index of its first item.
        end: Index behind its last item.
        size: Bytes of its text, which say where it may be cut, not whether it fits.
    """

    first: int
    end: int
    size: int


@dataclass(frozen=True, slots=True)
class Parts:
    """A history in parts.

    Attributes:
        pinned: How many items at its start are instructions, which always stay.
        spans: The rest, oldest first.
    """

    pinned: int
    spans: tuple[Span, ...]


class ContextPolicy(Protocol):
    """Decides what stays. All figures are tokens of the model that answers, but for the sizes of spans."""

    def parts(self, items: Sequence[Item]) -> Parts:
        """Return a history in parts."""
        ...

    def reserve(self, window: int, most_tokens: int | None) -> int:
        """Return what is kept free for the answer; `most_tokens` is the caller's limit on it, or None."""
        ...

    def notes(self, window: int) -> int:
        """Return the most that a summary may take, and as much again for memory."""
        ...

    def first(self, spans: Sequence[Span], counts: Sequence[int], *, window: int, room: int, covered: int) -> int:
        """Return the first span that stays; 0 if all fit.

        Args:
            spans: All, at least one.
            counts: Tokens of the newest spans, oldest first: all, or as many as are over the room together.
            window: The model's context length.
            room: What all that stays may have.
            covered: How many spans at the start a summary stands for.
        """
        ...

    def compact(self, counts: Sequence[int], *, room: int) -> int:
        """Return how many of the oldest shown spans a summary is to stand for; 0 if there is room enough."""
        ...
