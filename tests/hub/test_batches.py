from __future__ import annotations

import math

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.core.fleet import TelemetryBatch, TelemetryRow
from appliance.hub.batches import MOST_ROWS, Fact, Gap, sound
from tests.hub.telemetry_batches import NOW, batch, gap, row, run_of


def test_a_sound_batch_is_rows_and_gaps_without_a_hole() -> None:
    checked = sound("box", "metric", batch(gap(3, 7), row(8, a=1), row(9), gap(10, 10, 50), first=3))
    assert (checked.device, checked.stream, checked.boot, checked.first, checked.last) == ("box", "metric", 1, 3, 10)
    assert checked.facts == (Fact(8, NOW, "x", '{"a":1}'), Fact(9, NOW, "x", "{}"))
    assert checked.gaps == (Gap(3, 7, 5, NOW, NOW), Gap(10, 10, 50, NOW, NOW))


def refusal(sent: TelemetryBatch, stream: str = "metric") -> str:
    with pytest.raises(InvalidRequestError) as refused:
        sound("box", stream, sent)
    return refused.value.code


def test_rows_of_another_stream_are_refused() -> None:
    assert refusal(run_of(1, 2), "alarm") == "wrong_stream"
    assert refusal(run_of(1, 2), "x" * 10_000) == "wrong_stream"


def test_a_batch_of_no_rows_or_too_many_or_of_no_boot_is_refused() -> None:
    assert refusal(TelemetryBatch("metric", 1, 1, 1, [])) == "wrong_size"
    assert refusal(run_of(1, MOST_ROWS + 1)) == "wrong_size"
    assert refusal(run_of(1, 2, boot=0)) == "wrong_size"
    assert refusal(run_of(0, 2)) == "wrong_size"


def test_a_hole_an_overlap_and_a_wrong_end_are_refused() -> None:
    assert refusal(batch(row(1), row(3))) == "not_contiguous"
    assert refusal(batch(row(2), row(1))) == "not_contiguous"
    assert refusal(batch(row(1), row(1))) == "not_contiguous"
    assert refusal(batch(row(2), first=1)) == "not_contiguous"
    assert refusal(TelemetryBatch("metric", 1, 1, 9, [row(1)])) == "not_contiguous"


def test_a_gap_that_does_not_fit_is_refused() -> None:
    assert refusal(batch(gap(2, 5), first=1)) == "not_contiguous"
    assert refusal(batch(gap(5, 4), first=5)) == "not_contiguous"
    assert refusal(batch(gap(1, 5, 4), first=1)) == "not_contiguous"
    assert refusal(batch(TelemetryRow(1, NOW, "gap", {"first": 1}))) == "wrong_gap"
    assert refusal(batch(TelemetryRow(1, NOW, "gap", {"first": -1, "count": 1, "from": 0, "to": 0}))) == "wrong_gap"


def test_a_row_of_no_time_is_refused() -> None:
    assert refusal(batch(row(1, at=math.nan))) == "wrong_time"
    endless = {"first": 1, "count": 1, "from": math.inf, "to": 0.0}
    assert refusal(batch(TelemetryRow(1, NOW, "gap", endless))) == "wrong_time"
