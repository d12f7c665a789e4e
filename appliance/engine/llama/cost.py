"""What an engine step costs, learned from the steps themselves (pure).

The model is linear: a step with `d` decoding sequences and `p` prompt tokens takes `decode(d) + p × prefill`. Both are
exponentially weighted, so they follow a growing context, a changed clock rate and other programs on the machine.

A guessed token that is checked in a step adds a share of `decode(1)`; a share stays true while the whole machine gets
slower or faster. It is only measured while guesses are checked, and whether they are depends on it. So a measurement
moves it by a bounded part, and without any it goes back to the usual one.
"""

from __future__ import annotations

WEIGHT = 0.2
"""Share of the newest measurement."""
USUAL_DRAFT_SHARE = 0.3
"""What a guessed token adds to a step, as a share of a step of one token; as measured with a small model on a CPU."""
FORGETTING = 0.01
"""How much of the way back to the usual share a step without guesses goes."""


class StepCost:
    """Estimates in seconds. Until measured, decoding is free and a prompt token costs 5 ms, a slow two-core box."""

    def __init__(self) -> None:
        """Start without measurements."""
        self.prefill_token_s = 0.005
        self._decode_s: dict[int, float] = {}
        self._prefill_measured = False
        self._draft_share = USUAL_DRAFT_SHARE

    def decode_s(self, decoding: int) -> float:
        """Return the seconds of a step in which only `decoding` sequences take part, by the nearest measured count."""
        if decoding == 0 or not self._decode_s:
            return 0.0
        nearest = min(self._decode_s, key=lambda count: abs(count - decoding))
        return self._decode_s[nearest]

    @property
    def draft_token_s(self) -> float:
        """Return the seconds that a guessed token adds to a step; more than 0."""
        return max(self._draft_share * self.decode_s(1), 1e-7)

    def prefill_tokens_within(self, seconds: float, *, decoding: int) -> int:
        """Return how many prompt tokens fit a step of the given length beside the decoding sequences; may be 0."""
        return max(0, int((seconds - self.decode_s(decoding)) / self.prefill_token_s))

    def expected_s(self, decoding: int, prefill_tokens: int, draft_tokens: int) -> float:
        """Return how long a step will take."""
        return self.decode_s(decoding) + prefill_tokens * self.prefill_token_s + draft_tokens * self.draft_token_s

    def observe(self, *, decoding: int, prefill_tokens: int, seconds: float, draft_tokens: int = 0) -> None:
        """Learn from a step that was decoded; none has both prompt and guessed tokens."""
        if draft_tokens:
            self._observe_drafts((seconds - self.decode_s(decoding)) / draft_tokens)
            return
        if prefill_tokens == 0:
            self._draft_share += FORGETTING * (USUAL_DRAFT_SHARE - self._draft_share)
            before = self._decode_s.get(decoding, seconds)
            self._decode_s[decoding] = before + WEIGHT * (seconds - before)
            return
        measured = max(seconds - self.decode_s(decoding), 0.0) / prefill_tokens
        weight = WEIGHT if self._prefill_measured else 1.0
        self.prefill_token_s += weight * (measured - self.prefill_token_s)
        self.prefill_token_s = max(self.prefill_token_s, 1e-7)
        self._prefill_measured = True

    def _observe_drafts(self, seconds: float) -> None:
        """Learn what one guessed token added."""
        before = self._draft_share
        measured = seconds / max(self.decode_s(1), 1e-7)
        measured = min(max(measured, before / 2), before * 2)
        self._draft_share = min(max(before + WEIGHT * (measured - before), 0.001), 10.0)
