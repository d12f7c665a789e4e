"""The trials that go on: what is seen of each version, and what it comes to.

Once a second each version on trial is held against its terms (`soak`); the decision is a wish like any other, so that
`switching` follows it. Time counts while the version answers: one that nothing has been loaded for proves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.core.errors import NotFoundError
from appliance.core.wishes import Wish
from appliance.observe.metrics import VersionMetrics
from appliance.observe.resources import memory, resident_memory
from appliance.registry.wish_rows import Terms
from appliance.registry.wishes import Wishes
from appliance.serving.soak import Footprint, Observed, Record, Verdict, is_scarce, judge, looked
from appliance.serving.switching import Loader

LOGGER = logging.getLogger("appliance.serving")
LOOK_S = 1.0


class Kind(Protocol):
    """One kind of loaded models: it compares wish and fact by itself, but could do so sooner."""

    @property
    def names(self) -> frozenset[str]:
        """Return the full names of what is loaded."""
        ...

    @property
    def loading(self) -> bool:
        """Return True while something may be coming or going."""
        ...

    def wake(self) -> None:
        """Compare them at once."""
        ...


@dataclass(slots=True)
class _Watched:
    """A trial that this process has seen.

    Attributes:
        seen_at: The loop's time when it was.
        answers_since: When its version began to answer, or None while it does not.
        was_scarce: Memory was short before.
        footprint: What it has taken of the memory.
    """

    version: str
    seen_at: float
    was_scarce: bool
    footprint: Footprint
    answers_since: float | None = None


class Trials:
    """Watches every trial of the box."""

    def __init__(
        self, wishes: Wishes, loaders: Sequence[Loader], kinds: Sequence[Kind], metrics: VersionMetrics
    ) -> None:
        """Watch those versions that the loaders have; nothing happens until `run`."""
        self._wishes = wishes
        self._loaders = loaders
        self._kinds = kinds
        self._metrics = metrics
        self._watched: dict[str, _Watched] = {}
        self._known: dict[str, Wish] = {}
        self._look = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        self._known = dict(self._wishes.all())
        while True:
            await self._look_once()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._look.wait()
            except TimeoutError:
                continue
            self._look.clear()

    def wake(self) -> None:
        """Bring the facts to the wishes at once."""
        self._look.set()
        for each in self._kinds:
            each.wake()

    async def _look_once(self) -> None:
        wishes = self._wishes.all()
        self._count(dict(wishes))
        for name, wish in wishes.items():
            if wish.state == "trial":
                await self._watch(wish)
            else:
                self._watched.pop(name, None)
        self._metrics.show({name: full for each in self._loaders for name, full in each.short_names.answering.items()})

    def _count(self, now: dict[str, Wish]) -> None:
        """Count what has come to be since the last look, whoever wished it, and have the facts follow."""
        if now == self._known:
            return
        for name, wish in now.items():
            before = self._known.get(name)
            if before is not None and (before.version, before.state) == (wish.version, wish.state):
                continue
            if wish.state == "trial":
                self._metrics.trial_began(name)
            elif wish.state == "rolled_back":
                self._metrics.rolled_back(name)
        self._known = now
        for each in self._kinds:
            each.wake()

    async def _watch(self, wish: Wish) -> None:
        now = asyncio.get_running_loop().time()
        watched = self._watched.get(wish.name)
        if watched is None or watched.version != wish.version:
            free = memory()
            footprint = Footprint(0, resident_memory(os.getpid()), self._others(wish))
            watched = _Watched(wish.version, now, is_scarce(free.available, free.total), footprint)
            self._watched[wish.name] = watched
        record = self._record(wish)
        others_load = watched.answers_since is not None and any(each.loading for each in self._kinds)
        watched.footprint = looked(
            watched.footprint, resident_memory(os.getpid()), self._others(wish), others_load=others_load
        )
        if record is None:
            watched.answers_since = None
        elif watched.answers_since is None:
            watched.answers_since = now
        terms = await asyncio.to_thread(self._wishes.terms, wish.name)
        if terms is not None:
            await self._conclude(wish, judge(terms.soak, terms.criteria, _observed(watched, record, terms, now)))

    async def _conclude(self, wish: Wish, verdict: Verdict) -> None:
        full_name = f"{wish.name}:{wish.version}"
        try:
            if verdict.outcome == "confirmed":
                LOGGER.info("%s is confirmed: its trial went well", full_name)
                await asyncio.to_thread(self._wishes.confirm, wish.name, wish.version)
            elif verdict.outcome == "rolled_back":
                LOGGER.error("%s is rolled back: %s", full_name, verdict.reason)
                await asyncio.to_thread(
                    self._wishes.roll_back, wish.name, code=verdict.code, reason=verdict.reason, version=wish.version
                )
            else:
                return
        except NotFoundError as error:  # the wish was withdrawn meanwhile
            LOGGER.info("%s", error)
        self._look.set()

    def _others(self, wish: Wish) -> frozenset[str]:
        return frozenset().union(*(each.names for each in self._kinds)) - {f"{wish.name}:{wish.version}"}

    def _record(self, wish: Wish) -> Record | None:
        """Return what became of a version's requests, of all kinds, or None while it does not answer."""
        full_name = f"{wish.name}:{wish.version}"
        found = [
            record
            for each in self._loaders
            if each.short_names.answering.get(wish.name) == full_name and (record := each.record(full_name)) is not None
        ]
        return _together(found) if found else None


def _together(records: Sequence[Record]) -> Record:
    """Return the figures of a version that is loaded for several uses; the pace is that of the busiest."""
    busiest = max(records, key=lambda each: len(each.paces))
    return Record(sum(each.requests for each in records), sum(each.errors for each in records), busiest.paces)


def _observed(watched: _Watched, record: Record | None, terms: Terms, now: float) -> Observed:
    free = memory()
    return Observed(
        elapsed_s=0.0 if watched.answers_since is None else now - watched.answers_since,
        wished_s=now - watched.seen_at,
        requests=0 if record is None else record.requests,
        errors=0 if record is None else record.errors,
        slowest=0.0 if record is None else record.slowest,
        baseline=terms.baseline,
        available=free.available,
        total=free.total,
        was_scarce=watched.was_scarce,
        taken=watched.footprint.taken,
    )
