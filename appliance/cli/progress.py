"""Progress bars on standard error, in a terminal only; a script's log gets one line for each long step."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET_S = 1.0
"""Steps on this machine that are shorter are not worth a bar."""


class ProgressReport:
    """Called with what is being done, how much of it is done, and how much there is. A context manager."""

    def __init__(self, *, silent: bool, unit: str = "") -> None:
        """Show bars in a terminal, lines elsewhere, nothing if `silent`; counts are of `unit`, or else of bytes."""
        self._silent = silent
        self._unit = unit
        self._activity = ""
        self._began = 0.0
        self._shown = False
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, activity: str, done: int, total: int) -> None:
        """Report that `done` of the `total` bytes, or other units, of the activity are done."""
        if activity != self._activity:
            self._activity, self._began, self._shown, self._task = activity, time.monotonic(), False, None
        if self._silent or not (self._shown or self._is_long(activity)):
            return
        if not sys.stderr.isatty():
            if not self._shown:
                size = f"{total:,} {self._unit}" if self._unit else f"{total / 1e6:,.1f} MB"
                click.echo(f"{activity.capitalize()}: {size} ...", err=True)
            self._shown = True
            return
        self._shown = True
        bars = self._started_bars()
        if self._task is None:
            self._task = bars.add_task(activity.capitalize(), total=total)
        bars.update(self._task, completed=done, total=total)

    def _is_long(self, activity: str) -> bool:
        """Tell whether a step is worth showing: a download always is, since the network may fall silent."""
        return activity.startswith("downloading") or time.monotonic() - self._began >= QUIET_S

    def _started_bars(self) -> Progress:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            speed = (MofNCompleteColumn(),) if self._unit else (DownloadColumn(), TransferSpeedColumn())
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                *speed,
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bars.start()
        return self._bars

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
