"""How often the event loop hears of a running answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from appliance.core.errors import EngineError
from appliance.core.types import Delta, FinishReason
from appliance.engine.llama.commands import Report
from appliance.engine.llama.delivery import Delivery
from appliance.engine.llama.generation import Admitted, Event, Failed, Gained, LlamaGeneration
from appliance.engine.llama.scheduler import Scheduler

NOT_WITHIN_A_TEST_S = 1000.0


@dataclass
class _Ledger:
    used: int = 7


class _Books:
    """What `Delivery` reads of a scheduler."""

    running = ("sequence",)
    ledger = _Ledger()


BOOKS = cast("Scheduler", _Books())
SOMEONE = cast("LlamaGeneration", object())
TOKEN = Gained(Delta(0, "a", 1), 0.0)


def told_between_tokens(event: Event, interval_s: float = NOT_WITHIN_A_TEST_S) -> list[Report]:
    """Deliver a token, and then at once the event."""
    reports: list[Report] = []
    delivery = Delivery(reports.append, interval_s)
    delivery.add(SOMEONE, TOKEN)
    delivery.tell(1, 7)
    delivery.add(SOMEONE, TOKEN)
    delivery.add(SOMEONE, event)
    delivery.add_drafts(3, 2)
    delivery.tell_if_due(BOOKS)
    return reports[1:]


@pytest.mark.parametrize(
    "event",
    [Admitted(0, 0.0), Failed(EngineError("It broke."), 0.0), Gained(Delta(0, "", 0, (), FinishReason.STOP), 0.0)],
)
def test_a_beginning_an_end_and_an_error_are_told_at_once(event: Event) -> None:
    assert told_between_tokens(event) == [Report([(SOMEONE, TOKEN), (SOMEONE, event)], 1, 7, 3, 2)]


def test_tokens_that_come_quicker_than_the_interval_are_told_together() -> None:
    assert told_between_tokens(TOKEN) == []
    assert told_between_tokens(TOKEN, interval_s=0.0) == [Report([(SOMEONE, TOKEN), (SOMEONE, TOKEN)], 1, 7, 3, 2)]


def test_the_interval_starts_anew_with_every_delivery() -> None:
    reports: list[Report] = []
    delivery = Delivery(reports.append, NOT_WITHIN_A_TEST_S)
    delivery.add(SOMEONE, TOKEN)
    delivery.tell_if_due(BOOKS)
    delivery.add(SOMEONE, TOKEN)
    delivery.tell_if_due(BOOKS)
    delivery.tell(0, 0)
    assert [len(each.events) for each in reports] == [1, 1]
