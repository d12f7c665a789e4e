"""The outbox against a model of it: real SQLite, restarts, jumping clocks, a cap that is reached again and again."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.core.fleet import STREAMS, Stream
from appliance.store.outbox import SMALLEST_CAP_BYTES, Limits, Outbox
from appliance.store.outbox_rows import GAP, Row
from tests.store.clocks import SetClock

LIMITS = Limits(bytes=SMALLEST_CAP_BYTES, age_s=500.0, memory_bytes=30_000)
Place = tuple[Stream, int, int]
streams = st.sampled_from(STREAMS)


class OutboxMachine(RuleBasedStateMachine):
    """Knows which facts were appended and which were acknowledged; each other one is there, or counted by a gap."""

    @initialize()
    def open(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = SetClock()
        self.outbox = Outbox(self.folder / "telemetry.db", self.clock, LIMITS)
        self.appended: dict[Stream, dict[tuple[int, int], int]] = {each: {} for each in STREAMS}
        self.acknowledged: dict[Stream, set[tuple[int, int]]] = {each: set() for each in STREAMS}
        self.doubtful = dict.fromkeys(STREAMS, 0)

    @rule(stream=streams, size=st.sampled_from([0, 100, 5000, 15_000]), count=st.integers(1, 12))
    def append(self, stream: Stream, size: int, count: int) -> None:
        for _ in range(count):
            number = len(self.appended[stream])
            self.runner.run(self.outbox.append(stream, "fact", {"n": number, "pad": "x" * size}))
            self.appended[stream][self.outbox.newest(stream)] = number

    @rule(stream=streams, data=st.data())
    def acknowledge(self, stream: Stream, data: st.DataObject) -> None:
        waiting = self.waiting(stream)
        if not waiting:
            return
        first = data.draw(st.integers(0, len(waiting) - 1))
        found = self.outbox.rows_after(
            stream, (waiting[first].boot, waiting[first].first - 1), (2**60, 0), most=5, most_bytes=2**30
        )
        boot, low, high = found[0].boot, found[0].first, found[-1].last
        self.tell(stream, boot, low, high)

    @rule(stream=streams, low=st.integers(1, 30), length=st.integers(0, 30))
    def acknowledge_anything_of_this_boot(self, stream: Stream, low: int, length: int) -> None:
        boot = self.outbox.boot
        self.tell(stream, boot, low, low + length)

    def tell(self, stream: Stream, boot: int, low: int, high: int) -> None:
        """Acknowledge; with a gap that goes, all that it stood for is told, facts of earlier boots too.

        A gap that spans what was acknowledged before cannot know how much of it a part stands for.
        """
        before = self.waiting(stream)
        for gap in before:
            both = min(gap.last, high) - max(gap.first, low) + 1
            if gap.kind == GAP and gap.boot == boot and both > 0:
                span = {(boot, each) for each in range(gap.first, gap.last + 1)}
                self.doubtful[stream] += both if span & self.acknowledged[stream] else 0
        self.runner.run(self.outbox.acknowledge(stream, boot, low, high))
        there = {(boot, each) for each in range(low, high + 1)}
        for gap in before:
            if gap.kind == GAP and gap.boot == boot and low <= gap.first and gap.last <= high:
                kept = {(each.boot, each.last) for each in before if each.kind != GAP}
                there |= {each for each in self.appended[stream] if each <= (boot, gap.last) and each not in kept}
        self.acknowledged[stream] |= there & self.appended[stream].keys()

    @rule(seconds=st.sampled_from([0.0, 10.0, 300.0]), wall=st.sampled_from([0.0, -1e9, 1e9]))
    def time_passes_and_the_clock_jumps(self, seconds: float, wall: float) -> None:
        self.clock.pass_(seconds)
        self.clock.wall += wall

    @rule()
    def restart(self) -> None:
        self.runner.run(self.outbox.close())
        self.clock = SetClock(self.clock.wall)
        self.outbox = Outbox(self.folder / "telemetry.db", self.clock, LIMITS)

    def waiting(self, stream: Stream) -> list[Row]:
        rows: list[Row] = []
        after = (0, 0)
        while found := self.outbox.rows_after(stream, after, (2**60, 0), most=1000, most_bytes=2**30):
            rows += found
            after = (found[-1].boot, found[-1].last)
        return rows

    @invariant()
    def every_fact_is_there_or_acknowledged_or_in_a_gap(self) -> None:
        if not hasattr(self, "outbox"):
            return
        for stream in STREAMS:
            rows = self.waiting(stream)
            places = [(each.boot, each.last) for each in rows]
            assert places == sorted(set(places))
            facts = {(each.boot, each.last): each for each in rows if each.kind != GAP}
            for place, row in facts.items():
                assert f'"n":{self.appended[stream][place]},'.encode() in row.body
                assert place not in self.acknowledged[stream]
            missing = self.appended[stream].keys() - facts.keys() - self.acknowledged[stream]
            gaps = [each for each in rows if each.kind == GAP]
            told = {(each.boot, number) for each in gaps for number in range(each.first, each.last + 1)}
            assert told <= self.appended[stream].keys() - facts.keys()
            newest_gap = max((each.boot for each in gaps), default=0)
            assert {each for each in missing if each[0] >= newest_gap} <= told
            assert abs(sum(each.lost for each in gaps) - len(missing)) <= self.doubtful[stream]

    @invariant()
    def the_books_are_right_and_the_cap_is_held(self) -> None:
        if not hasattr(self, "outbox"):
            return
        held: dict[Stream, Any] = self.outbox.held()
        for stream in STREAMS:
            rows = self.waiting(stream)
            assert (held[stream].rows, held[stream].bytes) == (len(rows), sum(each.size for each in rows))
        pending = sum(each.size for each in self.outbox._pending)
        assert sum(each.bytes for each in held.values()) - pending <= LIMITS.bytes

    def teardown(self) -> None:
        if hasattr(self, "outbox"):
            self.runner.run(self.outbox.close())
            self.runner.close()
            shutil.rmtree(self.folder)


TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
