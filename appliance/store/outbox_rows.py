"""What becomes of the outbox's rows: which are lost when room is short, and what an acknowledgement leaves.

    sequence   1 2 3 4 5 6 7 8 9        rows of one stream and boot, each with its own sequence
    squeezed   [gap 1–4] 5 6 7 8 9      the oldest go first; one gap stands for all of them, next to none other
    acked 3–6  [gap 1–2]     7 8 9      what the hub has is gone, gaps included

So the sequences of a stream and boot are without holes from the oldest kept to the newest: each is told by a row of
its own or by a gap. Age is counted in the time that the program ran, since the wall clock may be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import msgspec

from appliance.core.fleet import STREAMS, Stream

GAP = "gap"
"""The kind of a row that tells of rows which were lost."""

ROW_BYTES = 96
"""What a row costs in the file beside its kind and body: its other columns and its share of the pages."""


@dataclass(frozen=True, slots=True)
class Row:
    """A fact, or a gap that stands for lost ones.

    Attributes:
        stream: Its class.
        boot: The start of the program in which it was written.
        first: The first sequence that it stands for; that of a fact is `last`.
        last: Its own sequence.
        at: Unix seconds of the first fact by the device's clock.
        until: The same of the last.
        lived: Seconds that the program had run when it was written, over all boots.
        lost: How many facts a gap stands for, those of earlier boots included; 0 for a fact.
        kind: What it is.
        body: A JSON object; a gap's is made when it is sent.
    """

    stream: Stream
    boot: int
    first: int
    last: int
    at: float
    until: float
    lived: float
    lost: int
    kind: str
    body: bytes

    @property
    def size(self) -> int:
        """Return what it counts for against the cap on bytes."""
        return ROW_BYTES + len(self.kind) + len(self.body)


def rank(stream: Stream) -> int:
    """Return the place of a stream's class, 0 being the most important."""
    return STREAMS.index(stream)


def content(row: Row) -> dict[str, object]:
    """Return the body as it is sent; a gap's says how many rows it stands for and from when to when."""
    if row.kind == GAP:
        return {"first": row.first, "count": row.lost, "from": row.at, "to": row.until}
    body: dict[str, object] = msgspec.json.decode(row.body, type=dict[str, object])
    return body


def merge(gap: Row | None, row: Row) -> Row:
    """Return the gap that stands for an earlier gap and the row after it; None is no earlier gap."""
    alone = replace(row, lost=max(row.lost, 1), kind=GAP, body=b"")
    if gap is None:
        return alone
    first = gap.first if gap.boot == row.boot else row.first
    return replace(alone, first=first, at=gap.at, lost=gap.lost + alone.lost)


def squeeze(oldest: Iterable[Row], enough: Callable[[int, Row], bool]) -> tuple[list[Row], Row | None]:
    """Choose what is lost of one stream.

    Args:
        oldest: The stream's rows, the oldest first.
        enough: Whether to stop, told the bytes that were freed so far and the next row.

    Returns:
        The rows that are lost, and the gap that takes their place; none if nothing would be gained.
    """
    victims: list[Row] = []
    gap: Row | None = None
    held = 0
    for row in oldest:
        if enough(held - (gap.size if gap else 0), row):
            break
        victims.append(row)
        held += row.size
        gap = merge(gap, row)
    if len(victims) == 1 and victims[0].kind == GAP:
        return [], None
    return victims, gap


def without(row: Row, first: int, last: int) -> list[Row]:
    """Return what is left of a row when the hub has the sequences from `first` to `last` of its boot and stream.

    A gap may span what the hub had before. Nobody knows whether what it has now was lost then: the gap goes on telling
    as much as its sequences allow, not more than before, but one at least for each part that is left of it.
    """
    if row.last < first or last < row.first:
        return [row]
    both = min(row.last, last) - max(row.first, first) + 1
    before, after = max(0, first - row.first), max(0, row.last - last)
    left = min(row.lost, max(row.lost - both, before + after))
    behind = max(1, min(after, left - 1)) if before else left
    rest = []
    if before:
        rest.append(replace(row, last=first - 1, lost=max(1, left - behind) if after else left))
    if after:
        rest.append(replace(row, first=last + 1, lost=behind))
    return rest
