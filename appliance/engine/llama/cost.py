"""What an engine step costs, learned from the steps themselves (pure).

A step evaluates `n` tokens in one batch, with `cells` KV cells in use before it. Attention makes every token dearer by
the cells that it looks at, so a step takes

    pace × (fixed + n × (token + attention × (cells + n)))

with one set of weights for steps that only decode, and another for those that also read prompts: matrix products over
many tokens cost less a token than over few. The weights are the shape of a model on a machine; they are learned by
recursive least squares on relative errors, with forgetting (Haykin, "Adaptive Filter Theory"). The pace is what changes
at once when another program takes the cores or the clock rate falls: the median, over the last seven steps, of measured
÷ expected. So a single step that was held up changes nothing, and a machine that became twice as slow is believed after
four steps.

A guessed token that is checked in a step adds a share of a step of one token; a share stays true while the whole
machine gets slower or faster. It is only measured while guesses are checked, and whether they are depends on it. So a
measurement moves it by a bounded part, and without any it goes back to the usual one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

PACE_STEPS = 7
"""How many steps the pace is taken from; more than half of them must agree."""
MEMORY = 0.99
"""What a measurement counts for one step later."""
NOISE = 0.1
"""Relative error of one measurement that is nothing to learn from."""
LARGEST_ERROR = 0.3
"""A relative error beyond this teaches no more than this: it is another program's, or the pace's."""
SHORTEST_S = 1e-7
"""Nothing takes less, so that nothing is divided by 0."""
CELLS = 1000.0
"""Unit of the cells, so that all weights are of about one size."""
USUAL_DRAFT_SHARE = 0.3
"""What a guessed token adds to a step, as a share of a step of one token; as measured with a small model on a CPU."""
DRAFT_WEIGHT = 0.2
"""Share of the newest measurement in what a guessed token adds."""
DRAFT_FORGETTING = 0.01
"""How much of the way back to the usual share a step without guesses goes."""


class StepCost:
    """Estimates in seconds. Until measured, decoding is free and prompts cost what they do on a slow two-core box."""

    def __init__(self) -> None:
        """Start without measurements."""
        self._decode = _Line((0.003, 0.006, 0.0006))
        self._read = _Line((0.02, 0.004, 0.001))
        self._draft_share = USUAL_DRAFT_SHARE

    def decode_s(self, decoding: int, cells: int = 0) -> float:
        """Return the seconds of a step in which only `decoding` sequences take part, a token each.

        Args:
            decoding: Sequences that decode.
            cells: KV cells in use before the step.
        """
        if decoding == 0 or not self._decode.measured:
            return 0.0
        return self._decode.seconds(_features(decoding, cells))

    def draft_token_s(self, cells: int = 0) -> float:
        """Return the seconds that a guessed token adds to a step; more than 0."""
        return max(SHORTEST_S, self._draft_share * self.decode_s(1, cells))

    def prefill_token_s(self, cells: int = 0) -> float:
        """Return the seconds that one more prompt token adds to a step."""
        _, token, attention = self._read.weights
        return self._read.pace * max(SHORTEST_S, token + attention * cells / CELLS)

    def prefill_tokens_within(self, seconds: float, *, decoding: int, cells: int = 0) -> int:
        """Return how many prompt tokens fit a step of the given length beside the decoding sequences; may be 0."""
        fixed, token, attention = self._read.weights
        rest = max(0.0, seconds / self._read.pace - fixed)
        square = attention / CELLS
        linear = max(SHORTEST_S, token + square * cells)
        # Of square × n² + linear × n = rest, in the form that divides by no small number.
        tokens = 2.0 * rest / (linear + math.sqrt(linear * linear + 4.0 * square * rest))
        return max(0, int(tokens) - decoding)

    def expected_s(self, *, decoding: int, prefill_tokens: int, draft_tokens: int, cells: int = 0) -> float:
        """Return how long a step will take."""
        if prefill_tokens:
            return self._read.seconds(_features(decoding + prefill_tokens, cells))
        return self.decode_s(decoding, cells) + draft_tokens * self.draft_token_s(cells)

    def observe(
        self, *, decoding: int, prefill_tokens: int, seconds: float, cells: int = 0, draft_tokens: int = 0
    ) -> None:
        """Learn from a step that was decoded; none has both prompt and guessed tokens.

        Args:
            decoding: Sequences that decoded.
            prefill_tokens: Prompt tokens in the step.
            seconds: What it took.
            cells: KV cells in use before the step.
            draft_tokens: Guessed tokens in the step.
        """
        if draft_tokens:
            self._observe_drafts((seconds - self.decode_s(decoding, cells)) / draft_tokens, cells)
            return
        if prefill_tokens == 0:
            self._draft_share += DRAFT_FORGETTING * (USUAL_DRAFT_SHARE - self._draft_share)
        line = self._read if prefill_tokens else self._decode
        features = _features(decoding + prefill_tokens, cells)
        seconds = max(seconds, SHORTEST_S)
        if line.measured:
            line.learn(features, seconds)
        else:
            line.begin(features, seconds)

    def _observe_drafts(self, seconds: float, cells: int) -> None:
        """Learn what one guessed token added."""
        before = self._draft_share
        measured = min(max(seconds / max(SHORTEST_S, self.decode_s(1, cells)), before / 2), before * 2)
        self._draft_share = min(max(before + DRAFT_WEIGHT * (measured - before), 0.001), 10.0)


class _Line:
    """A linear function of three features whose weights are learned, times the pace.

    Attributes:
        weights: Seconds a step, a token, and a token and thousand cells.
        pace: How much longer steps take than these weights say.
        measured: Whether the weights come from a measurement.
    """

    def __init__(self, guess: tuple[float, float, float]) -> None:
        self.weights = list(guess)
        self.pace = 1.0
        self.measured = False
        self._ratios = deque([1.0] * (PACE_STEPS // 2), maxlen=PACE_STEPS)
        self._doubt = list(guess)
        self._covariance = _diagonal(self._doubt)

    def seconds(self, features: Sequence[float]) -> float:
        """Return how long a step of these features takes."""
        return max(SHORTEST_S, self.pace * self._expected(features))

    def begin(self, features: Sequence[float], seconds: float) -> None:
        """Take the scale from the first measurement; the guess keeps its shape, and is doubted."""
        scale = seconds / self._expected(features)
        self.weights = [scale * each for each in self.weights]
        self._doubt = [scale * each for each in self._doubt]
        self._covariance = _diagonal(self._doubt)
        self.measured = True

    def learn(self, features: Sequence[float], seconds: float) -> None:
        """Take the pace from the last measurements, and move the weights towards what the pace does not explain."""
        expected = self._expected(features)
        self._ratios.append(seconds / expected)
        self.pace = median(self._ratios)
        row = [each / expected for each in features]
        error = max(-LARGEST_ERROR, min(LARGEST_ERROR, seconds / self.pace / expected - 1.0))
        spread = [_dot(line, row) for line in self._covariance]
        gain = [each / (NOISE * NOISE + _dot(spread, row)) for each in spread]
        self.weights = [max(0.0, weight + each * error) for weight, each in zip(self.weights, gain, strict=True)]
        self._forget(gain, spread)

    def _expected(self, features: Sequence[float]) -> float:
        return max(SHORTEST_S, _dot(self.weights, features))

    def _forget(self, gain: Sequence[float], spread: Sequence[float]) -> None:
        """Shrink the doubt by what was learned, and let it grow with time, but never beyond what it was at first."""
        count = range(len(gain))
        grown = [[(self._covariance[i][j] - gain[i] * spread[j]) / MEMORY for j in count] for i in count]
        shrink = [self._doubt[i] / math.sqrt(max(grown[i][i], self._doubt[i] ** 2)) for i in count]
        self._covariance = [[grown[i][j] * shrink[i] * shrink[j] for j in count] for i in count]


def _features(tokens: int, cells: int) -> tuple[float, float, float]:
    return (1.0, float(tokens), tokens * (cells + tokens) / CELLS)


def _diagonal(deviations: Sequence[float]) -> list[list[float]]:
    count = range(len(deviations))
    return [[deviations[i] ** 2 if i == j else 0.0 for j in count] for i in count]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
