"""Telemetry as the hub keeps it, in plain data, and what any store of it can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from appliance.core.fleet import Stream
from appliance.hub.batches import Batch


@dataclass(frozen=True, slots=True)
class Received:
    """A sound batch and when it came, in Unix seconds by the hub's clock."""

    batch: Batch
    at: float


@dataclass(frozen=True, slots=True)
class KeptRow:
    """A row as a device told it; `received` is by the hub's clock, which alone is to be trusted."""

    device: str
    stream: Stream
    boot: int
    sequence: int
    at: float
    received: float
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tally:
    """What is known of a device's telemetry as a whole.

    Attributes:
        device: Its id.
        lost: Rows that it lost before they could be sent, at most.
        refused: Batches that were refused.
        refusal: Why the last one was, or "".
        skew: Seconds that its clock was behind the hub's when it told of its health last; negative if ahead.
        heard: When its telemetry came last, Unix seconds by the hub's clock.
    """

    device: str
    lost: int
    refused: int
    refusal: str
    skew: float
    heard: float


@dataclass(frozen=True, slots=True)
class OpenAlarm:
    """An alarm that a device has raised and not cleared, as far as it has told.

    Attributes:
        device: Its id.
        name: Which alarm.
        since: Unix seconds by the device's clock.
        severity: `warning` or `critical`.
        detail: For a person.
        received: When the device told of its alarms last, by the hub's clock.
    """

    device: str
    name: str
    since: float
    severity: str
    detail: str
    received: float


class TelemetryStore(Protocol):
    """Keeps telemetry; several hubs may write to one store."""

    async def keep(self, batches: Sequence[Received]) -> None:
        """Keep every row that is not there yet; all is on the disk when this returns, or nothing is.

        Raises:
            StorageError: It cannot be written.
        """
        ...

    async def note_refusal(self, device: str, code: str, at: float) -> None:
        """Count a batch that was refused."""
        ...

    async def trim(self, *, received_before: float, most_rows: int) -> int:
        """Delete rows that came before a time, and the oldest of a stream with too many. Returns how many."""
        ...

    async def forget(self, device: str) -> None:
        """Delete all of a device: it is gone, or its id was given to another."""
        ...

    def rows(
        self,
        *,
        device: str | None = None,
        stream: Stream | None = None,
        received_from: float = 0.0,
        received_to: float = float("inf"),
        before: int | None = None,
        limit: int = 100,
    ) -> tuple[list[KeptRow], int | None]:
        """Return rows, those that came last first.

        Returns:
            The rows, and what to give as `before` for those after them, or None if there are none.
        """
        ...

    def latest_health(self, devices: Iterable[str] | None = None) -> dict[str, KeptRow]:
        """Return what each device told of its health last."""
        ...

    def open_alarms(self, device: str | None = None) -> list[OpenAlarm]:
        """Return the alarms that are open now."""
        ...

    def tallies(self, device: str | None = None) -> list[Tally]:
        """Return what is known of each device's telemetry as a whole."""
        ...
