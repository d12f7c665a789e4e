"""How many keys a role of the signed repository has, and how it stands."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.core.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """How many keys a role has, and how many of them have to sign."""

    keys: int
    threshold: int

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= self.keys <= 16:
            raise InvalidRequestError(
                f"{self.threshold} of {self.keys} keys cannot be made to sign.",
                advice="Use 1 to 16 keys, and a threshold of at least 1 and at most their number.",
            )


ROOT_PLAN = KeyPlan(3, 2)
"""So that one may be lost, and one may be stolen."""
TARGETS_PLAN = KeyPlan(2, 1)


@dataclass(frozen=True, slots=True)
class RoleState:
    """How a role stands, for a person.

    Attributes:
        role: One of TUF's four, or `director`.
        kept: `offline` or `online`.
        threshold: How many of its keys have to sign.
        keys: The ids of its keys.
        at_hand: The ids of those whose private half was found.
        version: Of its metadata; 0 for the director, which has none.
        expires: Unix seconds, or None.
        state: `valid`, `soon` to expire, or `expired`.
    """

    role: str
    kept: str
    threshold: int
    keys: tuple[str, ...]
    at_hand: tuple[str, ...]
    version: int
    expires: float | None
    state: str
