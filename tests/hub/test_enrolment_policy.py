"""Who gets an identity: every rule by itself, and what holds whatever is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.hub.enrolment_policy import (
    MOST_WAITING,
    Approval,
    ClaimFacts,
    EnrolmentState,
    Known,
    judge,
)

CLAIM = ClaimFacts(expires=1000.0, revoked=False, allowed=2, used=0, waiting=0, automatic=False)
NOW = 500.0


def state(
    claim: ClaimFacts | None, known: Known, approval: Approval = "manual", now: float = NOW
) -> tuple[object, bool]:
    verdict = judge(claim, known, "me", approval=approval, now=now)
    assert bool(verdict.detail) == (verdict.state != "issued"), "whoever gets nothing is told why"
    return verdict.state, verdict.sign


def test_a_new_box_waits_for_a_person() -> None:
    assert state(CLAIM, Known()) == ("waiting", False)
    assert state(CLAIM, Known("waiting")) == ("waiting", False)


def test_a_claim_or_the_hub_may_let_it_in_at_once() -> None:
    assert state(replace(CLAIM, automatic=True), Known()) == ("issued", True)
    assert state(CLAIM, Known(), "automatic") == ("issued", True)


def test_approval_leads_to_a_certificate_once() -> None:
    assert state(CLAIM, Known("approved")) == ("issued", True)
    assert state(CLAIM, Known("issued", "me")) == ("issued", False)


@pytest.mark.parametrize(
    "spent",
    [replace(CLAIM, revoked=True), replace(CLAIM, expires=NOW), replace(CLAIM, used=2)],
    ids=str,
)
def test_a_spent_claim_lets_nobody_in_and_takes_nothing_back(spent: ClaimFacts) -> None:
    assert state(spent, Known(), "automatic") == (None, False)
    assert state(spent, Known("waiting"), "automatic") == (None, False)
    assert state(spent, Known("approved")) == ("approved", False)
    assert state(spent, Known("issued", "me")) == ("issued", False)


def test_an_unknown_claim_is_refused() -> None:
    assert state(None, Known("issued", "me"), "automatic") == (None, False)


def test_a_copy_of_a_box_is_quarantined() -> None:
    assert state(CLAIM, Known(None, "other"), "automatic") == ("quarantined", False)
    assert state(CLAIM, Known("quarantined", "other"), "automatic") == ("quarantined", False)


def test_a_box_with_a_new_key_or_a_revoked_id_needs_a_person() -> None:
    assert state(CLAIM, Known(None, "me"), "automatic") == ("waiting", False)
    assert state(CLAIM, Known(None, None, barred=True), "automatic") == ("waiting", False)


def test_what_a_person_said_no_to_stays_no() -> None:
    assert state(CLAIM, Known("refused"), "automatic") == ("refused", False)
    assert state(CLAIM, Known("revoked"), "automatic") == ("revoked", False)


def test_a_lost_bundle_cannot_fill_the_disk() -> None:
    full = replace(CLAIM, waiting=MOST_WAITING)
    assert state(full, Known()) == (None, False)
    assert state(full, Known("waiting")) == ("waiting", False)


CLAIMS = st.none() | st.builds(
    ClaimFacts,
    expires=st.sampled_from([400.0, 1000.0]),
    revoked=st.booleans(),
    allowed=st.integers(1, 2),
    used=st.integers(0, 2),
    waiting=st.sampled_from([0, MOST_WAITING]),
    automatic=st.booleans(),
)
KNOWN = st.builds(
    Known,
    st.none() | st.sampled_from(get_args(EnrolmentState)),
    st.sampled_from([None, "me", "other"]),
    st.booleans(),
)


@given(CLAIMS, KNOWN, st.sampled_from(get_args(Approval)))
def test_nothing_is_signed_but_within_a_claim_for_an_id_that_is_free_or_was_approved(
    claim: ClaimFacts | None, known: Known, approval: Approval
) -> None:
    verdict = judge(claim, known, "me", approval=approval, now=NOW)
    if verdict.sign:
        assert claim is not None
        assert not claim.revoked
        assert claim.expires > NOW
        assert claim.used < claim.allowed
        assert known.state == "approved" or (known == Known() and (claim.automatic or approval == "automatic"))
