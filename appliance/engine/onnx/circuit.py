"""Whether a model that failed of late is asked again: a circuit breaker, as a pure state machine.

```
            N failures in a row              `open_s` later, for one trial
   closed ──────────────────────▶ open ──────────────────────────────▶ half open
     ▲                             ▲                                     │   │
     │                             └──────────── the trial fails ────────┘   │
     └────────────────────────────── anything succeeds ──────────────────────┘
```
"""

from __future__ import annotations

from enum import Enum, auto


class State(Enum):
    """Where the circuit stands."""

    CLOSED = auto()
    OPEN = auto()
    HALF_OPEN = auto()


class Circuit:
    """One model's circuit. Times are seconds of any one clock.

    Attributes:
        state: Half open is it only while a trial runs.
    """

    def __init__(self, *, failures: int, open_s: float) -> None:
        """Open after so many failures in a row, for so long."""
        self._most = failures
        self._open_s = open_s
        self._failures = 0
        self._until = 0.0
        self.state = State.CLOSED

    def refuses(self, now: float) -> bool:
        """Return True if a request that came now would be refused."""
        return self.state is State.HALF_OPEN or (self.state is State.OPEN and now < self._until)

    def admit(self, now: float) -> bool:
        """Return True if a request may go on; of an open circuit it is then the trial."""
        if self.refuses(now):
            return False
        if self.state is State.OPEN:
            self.state = State.HALF_OPEN
        return True

    @property
    def on_trial(self) -> bool:
        """Return True while a trial runs."""
        return self.state is State.HALF_OPEN

    def succeeded(self) -> None:
        """Take note that the model worked."""
        self._failures = 0
        self.state = State.CLOSED

    def failed(self, now: float) -> None:
        """Take note that the model failed."""
        self._failures += 1
        if self._failures >= self._most or self.state is not State.CLOSED:
            self.state = State.OPEN
            self._until = now + self._open_s

    def abandon(self) -> None:
        """Take note that the trial ended without having been run; the next request is one."""
        if self.state is State.HALF_OPEN:
            self.state = State.OPEN

    def retry_after(self, now: float) -> float:
        """Return the seconds until a request may be admitted."""
        return max(0.0, self._until - now)
