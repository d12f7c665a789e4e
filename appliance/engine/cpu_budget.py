"""Turns on the CPU: engines that compute at the same time share the cores instead of fighting for them.

Where two native libraries each compute with a thread a core, every parallel loop of both waits for the one thread that
has no core just then, and some spin while they wait. So each engine's thread takes a turn around its native call, and
gives it back after.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType


class CpuBudget:
    """The cores of the machine, lent in the order in which they were asked for.

    Who asks for many cores is not overtaken by those who ask for few: cores that come free are kept for the first in
    the queue. So nobody waits for more than those who were there before him.
    """

    def __init__(self, cores: int) -> None:
        """Lend so many cores, one or more."""
        assert cores > 0, "a machine has cores"
        self._cores = self._free = cores
        self._lock = threading.Lock()
        self._queue: deque[_Turn] = deque()

    def turn(self, threads: int) -> _Turn:
        """Return a context in which the calling thread may compute with so many threads; entering it may block.

        Who wants more cores than there are gets all of them. A thread that has a turn must not ask for another.
        """
        return _Turn(self, max(1, min(threads, self._cores)))

    @property
    def free(self) -> int:
        """Return how many cores are lent to nobody."""
        return self._free

    @property
    def waiting(self) -> int:
        """Return how many engines wait for their turn."""
        return len(self._queue)

    def _take(self, turn: _Turn) -> None:
        with self._lock:
            if not self._queue and turn.cores <= self._free:
                self._free -= turn.cores
                return
            turn.granted = threading.Lock()
            turn.granted.acquire()
            self._queue.append(turn)
        turn.granted.acquire()

    def _give_back(self, cores: int) -> None:
        with self._lock:
            self._free += cores
            while self._queue and self._queue[0].cores <= self._free:
                following = self._queue.popleft()
                self._free -= following.cores
                assert following.granted is not None, "who waits has a lock to wait for"
                following.granted.release()


class CpuShare:
    """What one engine wants of a budget.

    Attributes:
        threads: How many it computes with.
    """

    def __init__(self, budget: CpuBudget | None, threads: int) -> None:
        """Take turns of a budget; None is for an engine that needs none, as it computes elsewhere."""
        self._budget = budget
        self.threads = threads

    def turn(self) -> AbstractContextManager[None]:
        """Return a context to compute in; entering it may block."""
        return nullcontext() if self._budget is None else self._budget.turn(self.threads)


class _Turn:
    """One engine's turn."""

    __slots__ = ("_budget", "cores", "granted")

    def __init__(self, budget: CpuBudget, cores: int) -> None:
        self._budget = budget
        self.cores = cores
        self.granted: threading.Lock | None = None

    def __enter__(self) -> None:
        self._budget._take(self)  # noqa: SLF001 - the two are one

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._budget._give_back(self.cores)  # noqa: SLF001
