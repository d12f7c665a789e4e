"""Batches of telemetry as a device makes them, and as a misbehaving one does."""

from __future__ import annotations

from typing import Any

import msgspec

from appliance.core.fleet import Stream, TelemetryBatch, TelemetryRow, up
from appliance.core.messaging import Message
from appliance.messaging.compression import compress

NOW = 1_800_000_000.0


def row(sequence: int, *, at: float = NOW, kind: str = "x", **body: Any) -> TelemetryRow:
    return TelemetryRow(sequence, at, kind, body)


def gap(first: int, last: int, count: int | None = None) -> TelemetryRow:
    body = {"first": first, "count": last - first + 1 if count is None else count, "from": NOW, "to": NOW}
    return TelemetryRow(last, NOW, "gap", body)


def batch(*rows: TelemetryRow, stream: Stream = "metric", boot: int = 1, first: int | None = None) -> TelemetryBatch:
    return TelemetryBatch(stream, boot, rows[0].sequence if first is None else first, rows[-1].sequence, list(rows))


def run_of(first: int, last: int, *, stream: Stream = "metric", boot: int = 1, **body: Any) -> TelemetryBatch:
    return batch(*(row(each, number=each, **body) for each in range(first, last + 1)), stream=stream, boot=boot)


def message(device: str, sent: TelemetryBatch) -> Message:
    return as_message(device, sent.stream, compress(msgspec.json.encode(sent)), f"{sent.boot}.{sent.first}.{sent.last}")


def as_message(device: str, stream: str, payload: bytes, name: str | None = "1.1.1") -> Message:
    topic = up(device, "tm", stream)
    return Message(topic, payload, correlation=None if name is None else name.encode())
