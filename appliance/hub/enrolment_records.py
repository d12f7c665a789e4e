"""What the hub keeps of enrolment, as plain data, and what any store of it has to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from appliance.hub.enrolment_policy import Approval, EnrolmentState


@dataclass(frozen=True, slots=True)
class Asked:
    """A well-formed request: its certificate request was checked.

    Attributes:
        token: Proves which claim it is.
        device: The id that is wanted.
        instance: Of the box.
        key_digest: SHA-256 of the public key.
        facts: What the box says of itself.
    """

    token: str
    device: str
    instance: str
    key_digest: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Signed:
    """A certificate that was just signed; `chain` is PEM, `serial` lower-case hex."""

    serial: str
    chain: str
    expires: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to answer: `state` None is a refusal that was not worth keeping; `chain` is PEM or ""."""

    state: EnrolmentState | None
    chain: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ClaimRecord:
    """A claim; `used` counts the boxes it enrolled. Times are Unix seconds."""

    id: str
    created: float
    expires: float
    allowed: int
    used: int
    automatic: bool
    revoked: float | None


@dataclass(frozen=True, slots=True)
class EnrolmentRecord:
    """A request for an identity. Times are Unix seconds."""

    id: int
    device: str
    instance: str
    claim: str
    state: EnrolmentState
    facts: dict[str, Any]
    asked: float
    asked_last: float
    decided_by: str | None


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """A certificate that the hub signed for a device. Times are Unix seconds."""

    serial: str
    device: str
    issued: float
    expires: float
    revoked: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Barred:
    """A device whose certificates were all revoked, the last one at `revoked`; `seen` is when it last said anything, 0
    for never. Times are Unix seconds.
    """

    device: str
    revoked: float
    seen: float


class Enrolments(Protocol):
    """Where they are kept; SQLite here, PostgreSQL could do it."""

    async def answer(self, asked: Asked, sign: Callable[[], Signed], *, approval: Approval, now: float) -> Outcome:
        """Judge a request, and sign and keep what comes of it, in one transaction."""
        ...

    async def renew(self, device: str, key_digest: str, sign: Callable[[], Signed], *, now: float) -> Outcome:
        """Sign another certificate for a device whose own is valid; the same key gets the same one again."""
        ...
