"""A clock that goes when it is told to, and whose wall clock may jump."""

from __future__ import annotations


class SetClock:
    def __init__(self, unix: float = 0.0) -> None:
        self.now = 1000.0
        self.wall = unix

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.wall

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds
