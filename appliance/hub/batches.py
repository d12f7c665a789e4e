"""What of a batch of telemetry is to be believed: it is checked whole before any row is kept."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import msgspec

from appliance.core.errors import InvalidRequestError
from appliance.core.fleet import Count, Stream, TelemetryBatch, TelemetryRow

MOST_ROWS = 5000
GAP = "gap"


@dataclass(frozen=True, slots=True)
class Fact:
    """A row as it is kept; `body` is a JSON object."""

    sequence: int
    at: float
    kind: str
    body: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Rows that the device lost: those from `first` to `last`, and of earlier boots so many that it makes `count`."""

    first: int
    last: int
    count: int
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that is sound: its rows and gaps follow each other from `first` to `last` without a hole."""

    device: str
    stream: Stream
    boot: int
    first: int
    last: int
    facts: tuple[Fact, ...]
    gaps: tuple[Gap, ...]


class _GapBody(msgspec.Struct, frozen=True):
    first: Count
    count: Count
    since: float = msgspec.field(name="from")
    until: float = msgspec.field(name="to")


def sound(device: str, topic_stream: str, batch: TelemetryBatch) -> Batch:
    """Return a batch that may be kept.

    Args:
        device: Whose topic it came on.
        topic_stream: What the topic says that it is.
        batch: Hostile.

    Raises:
        InvalidRequestError: It is not sound; `code` is why.
    """
    if batch.stream != topic_stream:
        raise refusal("wrong_stream", f"rows of {batch.stream!r} came on the topic of {topic_stream[:64]!r}")
    if not 0 < len(batch.rows) <= MOST_ROWS or batch.boot < 1 or batch.first < 1:
        raise refusal("wrong_size", f"{len(batch.rows)} rows, boot {batch.boot}, from {batch.first}")
    facts: list[Fact] = []
    gaps: list[Gap] = []
    expected = batch.first
    for row in batch.rows:
        if not isfinite(row.at):
            raise refusal("wrong_time", f"row {row.sequence} is of no time")
        if row.kind == GAP:
            gaps.append(_gap(row, expected))
        elif row.sequence == expected:
            facts.append(Fact(row.sequence, row.at, row.kind, msgspec.json.encode(row.body).decode()))
        else:
            raise refusal("not_contiguous", f"row {row.sequence} came where {expected} was next")
        expected = row.sequence + 1
    if expected != batch.last + 1:
        raise refusal("not_contiguous", f"it ends with {expected - 1} and says {batch.last}")
    return Batch(device, batch.stream, batch.boot, batch.first, batch.last, tuple(facts), tuple(gaps))


def refusal(code: str, what: str) -> InvalidRequestError:
    """Return the error that says why a batch will never be taken; the device is told the code."""
    return InvalidRequestError(f"A batch of telemetry is not sound: {what}.", code=code)


def _gap(row: TelemetryRow, expected: int) -> Gap:
    try:
        body = msgspec.convert(row.body, _GapBody)
    except msgspec.ValidationError as error:
        raise refusal("wrong_gap", f"gap {row.sequence} does not say what is missing: {error}") from error
    if body.first != expected or not body.first <= row.sequence < body.first + body.count:
        raise refusal("not_contiguous", f"a gap from {body.first} to {row.sequence} came where {expected} was next")
    if not (isfinite(body.since) and isfinite(body.until)):
        raise refusal("wrong_time", f"gap {row.sequence} is of no time")
    return Gap(body.first, row.sequence, body.count, body.since, body.until)
