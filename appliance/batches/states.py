"""The life of a batch: which status follows which, upon what. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from appliance.core.batches import BatchStatus


class Event(StrEnum):
    """What happens to a batch."""

    VALIDATED = "validated"
    """All its lines will do."""

    REFUSED = "refused"
    """Its file or a line will not do."""

    WORKED_OFF = "worked_off"
    """Every line has its answer."""

    CANCEL = "cancel"
    EXPIRE = "expire"

    BREAK = "break"
    """Its input or its key is gone, or its output cannot be written."""

    WRITTEN = "written"
    """Its output files are there."""


@dataclass(frozen=True, slots=True)
class State:
    """Where a batch is; `outcome` is the status that it will have once its output is written, or None."""

    status: BatchStatus = "validating"
    outcome: BatchStatus | None = None


UNFINISHED: frozenset[BatchStatus] = frozenset(("validating", "in_progress", "finalizing", "cancelling"))

_NEXT: Mapping[tuple[BatchStatus, Event], State] = {
    ("validating", Event.VALIDATED): State("in_progress"),
    ("validating", Event.REFUSED): State("failed"),
    ("validating", Event.CANCEL): State("cancelling", "cancelled"),
    ("validating", Event.EXPIRE): State("finalizing", "expired"),
    ("validating", Event.BREAK): State("failed"),
    ("in_progress", Event.WORKED_OFF): State("finalizing", "completed"),
    ("in_progress", Event.CANCEL): State("cancelling", "cancelled"),
    ("in_progress", Event.EXPIRE): State("finalizing", "expired"),
    ("in_progress", Event.BREAK): State("finalizing", "failed"),
    ("finalizing", Event.BREAK): State("failed"),
    ("cancelling", Event.CANCEL): State("cancelling", "cancelled"),
    ("cancelling", Event.BREAK): State("failed"),
}


def after(state: State, event: Event) -> State | None:
    """Return the state that follows, or None where the event comes too late and changes nothing."""
    if event is Event.WRITTEN and state.outcome is not None:
        return State(state.outcome)
    return _NEXT.get((state.status, event))
