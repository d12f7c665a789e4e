"""One budget of the CPU for all engines: so many threads of theirs may compute at a time, the others take turns.

Each engine's thread takes a turn around its native call, and gives it back after. Two engines with a thread a core each
get most done side by side: on two cores a stream beside 32 embedding clients had 19 tokens a second and they 147
answers, with turns 8 and 130. So the budget is more than the cores, and keeps what is beyond from piling up: nobody
waits for more than those who were there before him, however many models compute.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

THREADS_A_CORE = 2
"""So many threads may compute for each core."""


class CpuBudget:
    """Threads that may compute, lent in the order in which they were asked for.

    Who asks for many is not overtaken by those who ask for few: what comes free is kept for the first in the queue. So
    nobody waits for more than those who were there before him.
    """

    def __init__(self, threads: int) -> None:
        """Lend so many threads, one or more."""
        assert threads > 0, "a machine has cores"
        self._threads = self._free = threads
        self._lock = threading.Lock()
        self._queue: deque[_Turn] = deque()

    def turn(self, threads: int) -> _Turn:
        """Return a context in which the calling thread may compute with so many threads; entering it may block.

        Who wants more than there are gets all of them. A thread that has a turn must not ask for another.
        """
        return _Turn(self, max(1, min(threads, self._threads)))

    @property
    def free(self) -> int:
        """Return how many threads are lent to nobody."""
        return self._free

    @property
    def waiting(self) -> int:
        """Return how many engines wait for their turn."""
        return len(self._queue)

    def _take(self, turn: _Turn) -> None:
        with self._lock:
            if not self._queue and turn.threads <= self._free:
                self._free -= turn.threads
                return
            turn.granted = threading.Lock()
            turn.granted.acquire()
            self._queue.append(turn)
        turn.granted.acquire()

    def _give_back(self, threads: int) -> None:
        with self._lock:
            self._free += threads
            while self._queue and self._queue[0].threads <= self._free:
                following = self._queue.popleft()
                self._free -= following.threads
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
        if self._budget is None:
            return nullcontext()
        return self._budget.turn(self.threads)


class _Turn:
    """One engine's turn."""

    __slots__ = ("_budget", "granted", "threads")

    def __init__(self, budget: CpuBudget, threads: int) -> None:
        self._budget = budget
        self.threads = threads
        self.granted: threading.Lock | None = None

    def __enter__(self) -> None:
        self._budget._take(self)  # noqa: SLF001 - the two are one

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._budget._give_back(self.threads)  # noqa: SLF001
