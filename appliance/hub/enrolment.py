"""The hub's side of enrolment: answers claims and renewals, and signs what the store says may be signed.

Whoever writes to a claim topic has a claim certificate; which claim it is tells the token in the message.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, InvalidRequestError, UnavailableError
from appliance.core.fleet import (
    CLAIM_ANSWER,
    CLAIM_REQUEST,
    LARGEST_DOCUMENT_BYTES,
    Answer,
    Claim,
    ClaimAnswer,
    Question,
    UpKind,
)
from appliance.core.messaging import Link, Message, Subscription
from appliance.core.printable import printable
from appliance.hub.enrolment_policy import Approval
from appliance.hub.enrolment_records import Asked, Enrolments, Outcome, Signed

logger = logging.getLogger(__name__)

CLAIMS = Subscription(f"{CLAIM_REQUEST}/+")
"""What the hub's connection has to receive for `EnrolmentPart.claim`."""

REVOCATIONS_EVERY_S = 2.0
NOT_APPROVED = "not_approved"
_ANSWER_EXPIRY_S = 60
_MOST_FACTS_BYTES = 4096


class Authority(Protocol):
    """The hub's certificate authority, as far as boxes are concerned."""

    def check_request(self, request: str, device: str) -> str:
        """Return the SHA-256 of the public key of a certificate request for exactly this device.

        Raises:
            InvalidRequestError: It is malformed, not signed with its own key, or asks for more than that.
        """
        ...

    def sign(self, request: str, device: str, *, days: int, now: float) -> Signed:
        """Sign a checked request; nothing of it but the public key gets into the certificate."""
        ...


@dataclass(frozen=True, slots=True)
class EnrolmentRules:
    """The hub's settings: who approves, and how long a certificate is valid."""

    approval: Approval = "manual"
    certificate_days: int = 90


class EnrolmentPart:
    """Answers boxes that want to become devices, and devices that want another certificate."""

    def __init__(
        self,
        enrolments: Enrolments,
        authority: Authority,
        link: Link,
        clock: Clock,
        *,
        rules: EnrolmentRules,
        refresh_revocations: Callable[[], bool] | None = None,
        end_revoked: Callable[[], Awaitable[Sequence[str]]] | None = None,
        on_enrolled: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """Connect the parts.

        Args:
            enrolments: The store.
            authority: Signs.
            link: The hub's connection.
            clock: For expiry.
            rules: The hub's settings.
            refresh_revocations: Has the broker learn who is revoked, if that is behind.
            end_revoked: Ends what connections they still have; awaited after that.
            on_enrolled: Awaited with the id of each device before its certificate is sent, as often as it is; another
                box's certificate may have been revoked for it.
        """
        self._enrolments = enrolments
        self._authority = authority
        self._link = link
        self._clock = clock
        self._rules = rules
        self._on_enrolled = on_enrolled
        self._refresh_revocations = refresh_revocations
        self._end_revoked = end_revoked

    @property
    def kinds(self) -> frozenset[UpKind]:
        """Return no topic: claims have one of their own, and renewals are questions."""
        return frozenset()

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:
        """Nothing comes here."""

    async def run(self) -> None:
        """Keep the broker's list of revoked certificates as the database has it, whoever changed it."""
        said = ""
        while self._refresh_revocations is not None:
            try:
                self._refresh_revocations()
                if self._end_revoked is not None:
                    await self._end_revoked()
            except ApplianceError as error:
                if str(error) != said:
                    logger.warning("Those who are revoked may still be connected: %s", error)
                said = str(error)
            else:
                said = ""
            await asyncio.sleep(REVOCATIONS_EVERY_S)

    async def claim(self, message: Message) -> None:
        """Take a message of `CLAIMS`; what is not a well-formed claim is dropped with a log line.

        Raises:
            StorageError: The database failed; the box asks again.
        """
        nonce = message.topic.removeprefix(f"{CLAIM_REQUEST}/")
        if message.retain or not nonce.isalnum():
            logger.warning("dropped a claim on %s: it was kept, or has no id", printable(message.topic[:200]))
            return
        try:
            wanted = _claim(message.payload)
        except InvalidRequestError as error:
            logger.warning("dropped what is no claim: %s", printable(str(error)))
            return
        answer = await self._answer(wanted)
        await self._send(f"{CLAIM_ANSWER}/{nonce}", answer)

    async def renew(self, device: str, question: Question) -> Answer:
        """Answer a device that asks for another certificate; the broker has checked that it is that device.

        Raises:
            StorageError: The database failed; the device asks again.
        """
        now = self._clock.unix()
        try:
            digest = self._authority.check_request(question.body, device)
        except InvalidRequestError as error:
            return Answer(False, now=now, code=error.code, detail=str(error))
        outcome = await self._enrolments.renew(device, digest, lambda: self._sign(question.body, device), now=now)
        if not outcome.chain:
            logger.warning("%s may not renew its certificate: %s", device, outcome.detail)
            return Answer(False, now=now, code=NOT_APPROVED, detail=outcome.detail)
        logger.info("renewed the certificate of %s", device)
        return Answer(True, data=outcome.chain.encode(), total=len(outcome.chain), now=now)

    async def _answer(self, wanted: Claim) -> ClaimAnswer:
        try:
            digest = self._authority.check_request(wanted.request, wanted.device)
        except InvalidRequestError as error:
            logger.warning("%s asked for a bad certificate: %s", wanted.device, printable(str(error)))
            return ClaimAnswer("refused", detail=str(error))
        asked = Asked(wanted.token, wanted.device, wanted.instance, digest, wanted.facts)
        outcome = await self._enrolments.answer(
            asked,
            lambda: self._sign(wanted.request, wanted.device),
            approval=self._rules.approval,
            now=self._clock.unix(),
        )
        logger.info("%s wants to be enrolled: %s", wanted.device, outcome.state or outcome.detail)
        if outcome.chain and self._on_enrolled is not None:
            await self._on_enrolled(wanted.device)
        return _told(outcome)

    def _sign(self, request: str, device: str) -> Signed:
        return self._authority.sign(request, device, days=self._rules.certificate_days, now=self._clock.unix())

    async def _send(self, topic: str, answer: ClaimAnswer) -> None:
        try:
            await self._link.publish(Message(topic, msgspec.json.encode(answer), expiry_s=_ANSWER_EXPIRY_S))
        except UnavailableError as error:  # the box asks again
            logger.info("an answer to a claim was not sent: %s", error)


def _claim(payload: bytes) -> Claim:
    if len(payload) > LARGEST_DOCUMENT_BYTES:
        raise InvalidRequestError(f"A claim of {len(payload):,} bytes is too large.")
    try:
        claim = msgspec.json.decode(payload, type=Claim)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"It does not have the form of a claim: {error}.") from error
    if len(msgspec.json.encode(claim.facts)) > _MOST_FACTS_BYTES:
        raise InvalidRequestError(f"The facts of a claim take more than {_MOST_FACTS_BYTES:,} bytes.")
    return claim


def _told(outcome: Outcome) -> ClaimAnswer:
    if outcome.state == "issued":
        return ClaimAnswer("issued", certificate=outcome.chain)
    if outcome.state in ("waiting", "approved"):
        return ClaimAnswer("waiting", detail=outcome.detail)
    return ClaimAnswer("refused", detail=outcome.detail)
