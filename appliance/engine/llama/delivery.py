"""What the steps brought, on its way to the event loop: one call for a step or for several quick ones."""

from __future__ import annotations

import time
from collections.abc import Callable

from appliance.engine.llama.commands import Report
from appliance.engine.llama.generation import Event, LlamaGeneration
from appliance.engine.llama.scheduler import Scheduler


class Delivery:
    """Collects events until they are told; belongs to the worker's thread."""

    def __init__(self, on_report: Callable[[Report], None], interval_s: float) -> None:
        """Tell `on_report`, and the middle of an answer not more often than each `interval_s`."""
        self._on_report = on_report
        self._interval_s = interval_s
        self._told_at = 0.0
        self._events: list[tuple[LlamaGeneration, Event]] = []
        self._drafts_checked = self._drafts_right = 0

    def add(self, generation: LlamaGeneration, event: Event) -> None:
        """Take an event for the next delivery."""
        self._events.append((generation, event))

    def add_drafts(self, checked: int, right: int) -> None:
        """Count guessed tokens, and how many of them were right."""
        self._drafts_checked += checked
        self._drafts_right += right

    def tell_if_due(self, scheduler: Scheduler) -> None:
        """Deliver, unless there is nothing but a few more tokens and the last delivery was only just now."""
        since_s = time.monotonic() - self._told_at
        if since_s >= self._interval_s or not all(each.can_wait for _, each in self._events):
            self.tell(len(scheduler.running), scheduler.ledger.used)

    def tell(self, running: int, used_cells: int) -> None:
        """Deliver what there is, and say how full the engine is."""
        self._told_at = time.monotonic()
        events, self._events = self._events, []
        checked, right = self._drafts_checked, self._drafts_right
        self._drafts_checked = self._drafts_right = 0
        self._on_report(Report(events, running, used_cells, checked, right))
