"""The measurements by name, and how to take them one after another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from appliance.bench import overload, responsiveness, start, throughput
from appliance.bench.report import Effort, Measurement, Progress, Report, Subject, report
from appliance.core.errors import ApplianceError

Measure = Callable[[Subject, Effort, Progress], Awaitable[Measurement]]

MEASUREMENTS: dict[str, Measure] = {
    "throughput": throughput.measure,
    "start": start.measure,
    "responsiveness": responsiveness.measure,
    "overload": overload.measure,
}


async def run(subject: Subject, names: Sequence[str], effort: Effort, progress: Progress, *, quick: bool) -> Report:
    """Take the named measurements, never two at once.

    Raises:
        ApplianceError: One of them could not be taken.
    """
    measurements = []
    for name in names:
        with ungrouped():
            measurements.append(await MEASUREMENTS[name](subject, effort, progress))
    return report(subject, measurements, quick=quick)


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raise the first of our errors in place of a group of nothing else, as task groups make it.

    Raises:
        ApplianceError: See above.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        ours, others = group.split(ApplianceError)
        if ours is None or others is not None:
            raise
        raise next(_leaves(ours)) from None


def _leaves(group: BaseExceptionGroup[ApplianceError]) -> Iterator[ApplianceError]:
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _leaves(each)
        else:
            yield each
