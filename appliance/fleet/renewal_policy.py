"""When a box renews its certificate, and when it asks again: pure rules."""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST_RETRY_S = 60.0
LONGEST_RETRY_S = 6 * 3600.0
CLOCK_CHECK_S = 3600.0
"""A wait is cut to this, for the wall clock may be set meanwhile."""
SPREAD = 0.05
"""Part of a certificate's life over which a fleet's renewals are spread."""


@dataclass(frozen=True, slots=True)
class Validity:
    """From when to when a certificate is valid, Unix seconds."""

    begins: float
    ends: float

    @property
    def renewal(self) -> float:
        """Return the time of two thirds of its life."""
        return self.begins + (self.ends - self.begins) * 2 / 3


def until_due_s(validity: Validity, *, now: float, fraction: float) -> float:
    """Return the seconds after which to look again, 0 if the certificate is to be renewed now.

    A clock from before the certificate was made (a box without a battery shows 1970) tells nothing, so nothing is
    renewed by it: that box learns the time from the hub and looks again.

    Args:
        validity: Of the certificate in use.
        now: Unix seconds, as well as is known.
        fraction: Random, from 0 to 1, evenly, the same for this certificate: a fleet that was enrolled on one day does
            not renew in one minute.
    """
    if now < validity.begins:
        return CLOCK_CHECK_S
    due = validity.renewal + (validity.ends - validity.begins) * SPREAD * fraction
    return min(max(0.0, due - now), CLOCK_CHECK_S)


def retry_s(failures: int, *, fraction: float) -> float:
    """Return the seconds to wait after so many renewals that failed in a row; `fraction` is random, from 0 to 1."""
    ceiling = min(LONGEST_RETRY_S, SHORTEST_RETRY_S * 2.0 ** min(failures, 16))
    return SHORTEST_RETRY_S + fraction * (ceiling - SHORTEST_RETRY_S)
