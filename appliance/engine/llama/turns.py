"""Whose step it is when sequences run under different adapters (pure).

An adapter applies to a whole batch, so a batch holds sequences of one adapter only; the base model alone counts as an
adapter too, the one called "". They take turns: a turn goes to the one that has waited for longest, and lasts for one
step at least. Who comes back after a pause keeps his place, so that coming and going gains nothing.

    share of a turn = target latency ÷ number of adapters that have work

so that everybody's turn comes round within the target, where steps are short enough. But to change the adapter makes
llama.cpp plan its memory anew, so a share is at least `SWITCHES_PER_TURN` times what that costs, as measured, which
bounds the part of the time that is lost to it; though never more than the target itself, however the machine falters.
"""

from __future__ import annotations

from collections.abc import Collection

SWITCHES_PER_TURN = 4
WEIGHT = 0.2
"""Share of the newest measurement of what a switch costs."""


class Turns:
    """The order of the adapters, and how long the current turn has lasted.

    Attributes:
        current: The adapter of the last step; the context has it set.
        switch_s: What a change of adapter costs, in seconds.
    """

    def __init__(self) -> None:
        """Start with the base model's turn, which has lasted for no time yet."""
        self.current = ""
        self.switch_s = 0.0
        self._spent = 0.0
        self._turns = 0
        self._last_turn: dict[str, int] = {"": 0}

    def next(self, adapters: Collection[str], target_s: float) -> str:
        """Return whose step it is among those that have work; asking changes nothing.

        Args:
            adapters: Those that have work.
            target_s: The longest that anyone should wait for his turn, if that can be.

        Raises:
            ValueError: Nobody has work.
        """
        if self.current in adapters and (len(adapters) == 1 or self._spent < self.share_s(len(adapters), target_s)):
            return self.current
        return min(adapters, key=lambda each: (self._last_turn.get(each, -1), each))

    def share_s(self, adapters: int, target_s: float) -> float:
        """Return how many seconds a turn may last while so many adapters have work."""
        return min(target_s, max(target_s / adapters, SWITCHES_PER_TURN * self.switch_s))

    def served(self, adapter: str, seconds: float, usual_s: float = 0.0) -> None:
        """Record a step.

        Args:
            adapter: Whose it was.
            seconds: How long it took.
            usual_s: Of the first step after a switch: how long it would have taken without; the rest is the switch's.
        """
        if adapter != self.current:
            cost = max(0.0, seconds - usual_s)
            self.switch_s += WEIGHT * (cost - self.switch_s)
            self._turns += 1
            self.current, self._spent = adapter, 0.0
            self._last_turn[adapter] = self._turns
        self._spent += seconds

    def forget(self, adapter: str) -> None:
        """Give up the place of an adapter that is not loaded any more."""
        self._last_turn.pop(adapter, None)
