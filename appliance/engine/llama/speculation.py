"""How many tokens are worth guessing ahead: the policy of speculative decoding by prompt lookup (pure).

A step that checks guessed tokens beside the ones it must compute takes a known time longer for each, and saves the time
of a token for each that is right. So the chance of being right decides. Every sequence learns it for itself, by how
long the match was that a guess comes from, and learning costs nothing: where no guess is worth being checked, the token
that comes is compared with it all the same. What learning cannot foresee, an account bounds: a sequence starts with the
time of one token, earns a small share of one in each step, and pays for its wrong guesses; who has spent all does not
guess. Times are in tokens here: what a sequence would have gained meanwhile without guessing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from appliance.engine.llama.lookup import LONGEST_MATCH, PromptLookup

DRAFT_TOKENS = 12
"""Most guessed tokens of one step, over all sequences; each needs a row of logits."""
MOST_DECODING = 4
"""Beside more decoding sequences nothing is guessed: a step is then put to good use as it is."""
MARGIN = 1.2
"""A guess must be expected to save so many times what it costs."""
OPENING_TOKENS = 1.0
LARGEST_TOKENS = 4.0
"""What the account starts with, and the most that it can hold."""
LOSS_SHARE = 0.015
"""What it earns in a step: the share of its time that a sequence may lose on wrong guesses in the long run."""

USUAL_CHANCES = (0.35, 0.45, 0.6, 0.8, 0.9)
"""How often the token after a match is right, by `_CLASSES`; measured on answers about documents and without one."""
USUAL_WEIGHT = 8.0
"""How many trials of its own a sequence needs to count as much as these."""
MEMORY = 0.95
"""What is left of a trial's weight when the next one comes: texts change from prose to quotation and back."""
_CLASSES = [0 if n <= 2 else 1 if n == 3 else 2 if n <= 5 else 3 if n <= 11 else 4 for n in range(LONGEST_MATCH + 1)]
"""The lengths of a match that are told apart."""


class Drafter:
    """What one decoding sequence may guess, and how well it guessed so far.

    Attributes:
        guess: The tokens that may follow the sequence's end, as far as they are known and did not turn out wrong.
    """

    def __init__(self, tokens: array[int]) -> None:
        """Begin with the usual chances; `tokens` is kept, and read as it grows."""
        self._lookup = PromptLookup(tokens)
        self._right = [USUAL_WEIGHT * each for each in USUAL_CHANCES]
        self._trials = [USUAL_WEIGHT] * len(USUAL_CHANCES)
        self._match_length = 0
        self._account = OPENING_TOKENS
        self._price = 0.0
        self.guess: array[int] = array("i")

    def look(self, *, longest: int, price: float) -> None:
        """Look up what may follow, before a step.

        Args:
            longest: Most tokens that are of use.
            price: The time that checking one takes.
        """
        self._price = price
        self._account = min(self._account + LOSS_SHARE, LARGEST_TOKENS)
        match = self._lookup.find() if self._lookup.catch_up() else None
        if match is None or longest <= 0:
            self.guess = array("i")
            return
        self.guess = self._lookup.propose(match, min(longest, DRAFT_TOKENS))
        self._match_length = match.length

    def chance(self, place: int) -> float:
        """Return how likely the guessed token at `place` is right if all before it are."""
        kind = self._class(place)
        return self._right[kind] / self._trials[kind]

    def can_afford(self, count: int) -> bool:
        """Return whether the account covers so many guesses, should all be wrong."""
        return count * self._price <= self._account

    def observe(self, token: int) -> None:
        """Learn from the token that came next."""
        if not self.guess:
            return
        right = token == self.guess[0]
        kind = self._class(0)
        self._trials[kind] = MEMORY * self._trials[kind] + 1.0
        self._right[kind] = MEMORY * self._right[kind] + right
        if right:
            self._match_length += 1
            del self.guess[0]
        else:
            self.guess = array("i")

    def settle(self, *, checked: int, accepted: int) -> None:
        """Book what the checked guesses cost, and what those that were right saved."""
        self._account += accepted - checked * self._price

    def _class(self, place: int) -> int:
        return _CLASSES[min(self._match_length + place, LONGEST_MATCH)]


def choose_drafts(drafters: Sequence[Drafter], *, room: int, price: float) -> list[int]:
    """Return how many tokens of each decoding sequence's guess to check in the next step.

    The likeliest come first, for as long as each more of them raises the tokens expected in a given time.

    Args:
        drafters: One for each decoding sequence; all have looked.
        room: Most tokens to check.
        price: The time that checking one takes.
    """
    counts = [0] * len(drafters)
    chances = [each.chance(0) if each.guess else 0.0 for each in drafters]
    gained = spent = float(len(drafters))
    while sum(counts) < room:
        best = max(range(len(drafters)), key=chances.__getitem__)
        if chances[best] * spent <= MARGIN * price * gained:
            break
        drafter = drafters[best]
        if not drafter.can_afford(counts[best] + 1):
            chances[best] = 0.0
            continue
        gained += chances[best]
        spent += price
        counts[best] += 1
        chances[best] *= drafter.chance(counts[best]) if counts[best] < len(drafter.guess) else 0.0
    return counts
