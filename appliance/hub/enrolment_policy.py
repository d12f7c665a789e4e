"""Who gets an identity: pure rules over what a claim may do, and what is known of the id that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Approval = Literal["manual", "automatic"]
"""The hub's setting: a person approves each box, unless its claim was made to approve by itself; or nobody is asked."""

EnrolmentState = Literal["waiting", "quarantined", "approved", "issued", "refused", "revoked"]

MOST_WAITING = 1000
"""Boxes of one claim that may wait for a person; one more is refused, so that a lost bundle cannot fill the disk."""


@dataclass(frozen=True, slots=True)
class ClaimFacts:
    """What a claim may do.

    Attributes:
        expires: Unix seconds.
        revoked: Whether it was taken back.
        allowed: Boxes that it may enrol.
        used: Boxes that it has enrolled.
        waiting: Boxes that wait for a person with it.
        automatic: Whether it enrols without asking a person.
    """

    expires: float
    revoked: bool
    allowed: int
    used: int
    waiting: int
    automatic: bool


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the id that is asked for.

    Attributes:
        state: Of this very request (id, instance and key), or None if it is new.
        holder: Instance of the box that has the id now, or None.
        barred: Whether a box of this id was revoked: only a person lets the id in again.
    """

    state: EnrolmentState | None = None
    holder: str | None = None
    barred: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a request.

    Attributes:
        state: Of the request from now on; None if it is not worth keeping.
        sign: Whether a certificate is to be signed now.
        detail: For the person at the box.
    """

    state: EnrolmentState | None
    sign: bool = False
    detail: str = ""


_ASK = "Ask whoever runs the hub."


def judge(claim: ClaimFacts | None, known: Known, instance: str, *, approval: Approval, now: float) -> Verdict:
    """Decide on a well-formed request; the same request gets the same answer however often it comes.

    Args:
        claim: Whose certificate asks, or None if the hub knows no such claim.
        known: Of the id that is wanted.
        instance: Of the box that asks.
        approval: The hub's setting.
        now: Unix seconds.
    """
    if claim is None:
        return Verdict(None, detail="The hub does not know this claim.")
    if known.state is not None and (settled := _settled(claim, known.state, now)) is not None:
        return settled
    if (fault := _fault(claim, now)) is not None:
        return Verdict(None, detail=fault)
    return _decide(claim, known, instance, approval)


def _decide(claim: ClaimFacts, known: Known, instance: str, approval: Approval) -> Verdict:
    if known.state in ("waiting", "quarantined"):
        return _still(known.state)
    if claim.waiting >= MOST_WAITING:
        return Verdict(None, detail=f"{claim.waiting} boxes of this claim wait for approval already.")
    if known.holder is not None and known.holder != instance:
        return _still("quarantined")
    if known.holder is not None or known.barred:
        return _still("waiting")
    if approval == "automatic" or claim.automatic:
        return Verdict("issued", sign=True)
    return _still("waiting")


def _settled(claim: ClaimFacts, state: EnrolmentState, now: float) -> Verdict | None:
    if state == "issued":
        return Verdict("issued")
    if state == "refused":
        return Verdict("refused", detail=f"An operator refused this box. {_ASK}")
    if state == "revoked":
        return Verdict("revoked", detail=f"The certificate of this box was revoked. {_ASK}")
    if state == "approved":
        fault = _fault(claim, now)
        return Verdict("issued", sign=True) if fault is None else Verdict("approved", detail=fault)
    return None


def _fault(claim: ClaimFacts, now: float) -> str | None:
    if claim.revoked:
        return f"This claim was revoked. {_ASK}"
    if now >= claim.expires:
        return f"This claim has expired. {_ASK}"
    if claim.used >= claim.allowed:
        return f"This claim has enrolled all {claim.allowed} boxes that it may. {_ASK}"
    return None


def _still(state: Literal["waiting", "quarantined"]) -> Verdict:
    if state == "waiting":
        return Verdict("waiting", detail="An operator has to approve this box: appliance hub devices approve ID.")
    return Verdict("quarantined", detail=f"Another installation has this id: is this box a copy of another? {_ASK}")
