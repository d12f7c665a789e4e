"""What of a long history a model is shown. Pure.

    window   |instructions, tools| summary |  recent turns, whole  | memory | newest turn | answer |

A history that fits is shown whole. One that does not loses its oldest turns; a summary of them, if there is one, and
what of them the newest turn speaks of stand for them. A turn is never split, nor is a call from its result.

What this costs in prefix reuse. The engine computes a prompt anew from the first token that differs from what it
holds, so what is shown must begin alike from turn to turn:

- A cut moves in strides. Cut just enough, and the beginning would differ with every turn. So the history has borders,
  about a quarter of a window apart, which depend on nothing but the text before them; the first turn that is shown
  begins at one. Between two moves, a turn computes only what is new. A move computes all that is shown, about once in
  a quarter of a window. Nothing is remembered for it: after a restart the same cut is found.
- A summary stands before the recent turns. A new one moves the cut to behind what it covers, so it costs as much as a
  move, at a time that would have needed one soon.
- Memory stands in the newest turn, behind all that is stable, as it is another one each time. It costs the turn before,
  which was computed with a memory that is not shown again: its question and its answer are computed once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from appliance.core.context import Parts, Span
from appliance.core.sessions import Item
from appliance.sessions.texts import text_of

INSTRUCTION_ROLES = frozenset({"system", "developer"})

ITEM_BYTES = 16
"""What stands around an item's text in the prompt, about."""

_ENDS: Mapping[str, tuple[str, str]] = {
    "function_call": ("function_call_output", "call_id"),
    "mcp_approval_request": ("mcp_approval_response", "approval_request_id"),
}
"""By the type of an item, the type of another that must stay with it, and its field that names it."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Answers `core.context.ContextPolicy`.

    Attributes:
        answer_tokens: Kept free for an answer without a limit of its own, at most a quarter of the window.
        notes_share: Of the window, what a summary may take, and memory as much again.
        full_share: Of the room, from where on a summary is to be written.
        kept_share: Of the room, what the turns may take that the summary leaves as they are.
        strides: Borders in a window at least; at most twice as many.
    """

    answer_tokens: int = 1024
    notes_share: float = 1 / 8
    full_share: float = 3 / 4
    kept_share: float = 1 / 2
    strides: int = 3

    def parts(self, items: Sequence[Item]) -> Parts:
        """Return a history in parts."""
        pinned = next((index for index, each in enumerate(items) if not _instructs(each)), len(items))
        starts = [pinned, *_borders(items, pinned)] if pinned < len(items) else []
        ends = [*starts[1:], len(items)]
        return Parts(pinned, tuple(Span(*each, _size(items[slice(*each)])) for each in zip(starts, ends, strict=False)))

    def reserve(self, window: int, most_tokens: int | None) -> int:
        """Return what is kept free for the answer: at least one token, at most half of the window."""
        if most_tokens is not None:
            return max(1, min(most_tokens, window // 2))
        return max(1, min(self.answer_tokens, window // 4))

    def notes(self, window: int) -> int:
        """Return the most that a summary may take, and as much again for memory."""
        return int(window * self.notes_share)

    def first(self, spans: Sequence[Span], counts: Sequence[int], *, window: int, room: int, covered: int) -> int:
        """Return the first span that stays; see `core.context.ContextPolicy.first`."""
        least = len(spans) - _fitting(counts, room)
        if least == 0:
            return 0
        newest = len(spans) - 1
        if least >= newest:
            return newest
        offsets = [0, *accumulate(each.size for each in spans)]
        stride = self._stride(sum(each.size for each in spans[-len(counts) :]), sum(counts), window)
        at_border = (
            each for each in range(least, newest + 1) if offsets[each] // stride != offsets[each - 1] // stride
        )
        return max(next(at_border, least), min(covered, newest))

    def compact(self, counts: Sequence[int], *, room: int) -> int:
        """Return how many of the oldest shown spans a summary is to stand for; 0 if there is room enough."""
        if len(counts) < 2 or sum(counts) < self.full_share * room:
            return 0
        return len(counts) - max(1, _fitting(counts, int(self.kept_share * room)))

    def _stride(self, size: int, tokens: int, window: int) -> int:
        """Return the bytes between two borders, a power of two, so that a change of texts moves few of them."""
        wanted = int(window * size / max(1, tokens) / self.strides)
        return 1 << max(1, wanted).bit_length() - 1


def _fitting(counts: Sequence[int], room: int) -> int:
    """Return how many of the newest fit together."""
    return sum(1 for total in accumulate(reversed(counts)) if total <= room)


def _instructs(item: Item) -> bool:
    return item.get("type", "message") == "message" and item.get("role") in INSTRUCTION_ROLES


def _asks(item: Item) -> bool:
    return item.get("type", "message") == "message" and item.get("role") in INSTRUCTION_ROLES | {"user"}


def _borders(items: Sequence[Item], pinned: int) -> Iterator[int]:
    """Yield where turns begin behind the first: at a message to the model that no message to it is just before."""
    ends = _last_ends(items)
    until = 0
    for index in range(pinned, len(items)):
        if index > max(pinned, until) and _asks(items[index]) and not _asks(items[index - 1]):
            yield index
        until = max(until, ends.get(_name(items[index]), 0))


def _last_ends(items: Sequence[Item]) -> dict[tuple[str, str], int]:
    """Return by what must stay together where the last of it is."""
    closing = {kind: (opening, field) for opening, (kind, field) in _ENDS.items()}
    found: dict[tuple[str, str], int] = {}
    for index, each in enumerate(items):
        kind = str(each.get("type"))
        if kind in closing:
            opening, field = closing[kind]
            found[opening, str(each.get(field))] = index
    return found


def _name(item: Item) -> tuple[str, str]:
    """Return what the ends of an item are found by."""
    kind = str(item.get("type"))
    return kind, str(item.get("call_id" if kind == "function_call" else "id"))


def _size(items: Sequence[Item]) -> int:
    return sum(ITEM_BYTES + len(text_of(each).encode("utf-8", "replace")) for each in items)
