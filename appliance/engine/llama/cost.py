"""What an engine step costs, learned from the steps themselves (pure).

The model is linear: a step with `d` decoding sequences and `p` prompt tokens takes `decode(d) + p × prefill`. Both are
exponentially weighted, so they follow a growing context, a changed clock rate and other programs on the machine.
"""

from __future__ import annotations

WEIGHT = 0.2
"""Share of the newest measurement."""


class StepCost:
    """Estimates in seconds. Until measured, decoding is free and a prompt token costs 5 ms, a slow two-core box."""

    def __init__(self) -> None:
        """Start without measurements."""
        self.prefill_token_s = 0.005
        self._decode_s: dict[int, float] = {}
        self._prefill_measured = False

    def decode_s(self, decoding: int) -> float:
        """Return the seconds of a step in which only `decoding` sequences take part, by the nearest measured count."""
        if decoding == 0 or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda count: abs(count - decoding))
        return self._decode_s[nearest]

    def prefill_tokens_within(self, seconds: float, *, decoding: int) -> int:
        """Return how many prompt tokens fit a step of the given length beside the decoding sequences; may be 0."""
        return max(0, int((seconds - self.decode_s(decoding)) / self.prefill_token_s))

    def observe(self, *, decoding: int, prefill_tokens: int, seconds: float) -> None:
        """Learn from a step that was decoded."""
        if prefill_tokens == 0:
            before = self._decode_s.get(decoding, seconds)
            self._decode_s[decoding] = before + WEIGHT * (seconds - before)
            return
        measured = max(seconds - self.decode_s(decoding), 0.0) / prefill_tokens
        weight = WEIGHT if self._prefill_measured else 1.0
        self.prefill_token_s += weight * (measured - self.prefill_token_s)
        self.prefill_token_s = max(self.prefill_token_s, 1e-7)
        self._prefill_measured = True
