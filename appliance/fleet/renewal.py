"""Renews the box's certificate in time; the old one is kept until the new one has worked.

two thirds of its life ─▶ request-key.pem ─▶ Question(renew) ─▶ checked ─▶ credentials.pem, the old ones beside
the next connecting works ─▶ the newer ones are in use: the old are forgotten; the older ones: the new are
no connection for long    ─▶ the two change places, for the broker may refuse the new ones
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, InvalidRequestError, PermissionDeniedError, StorageError
from appliance.core.fleet import DownKind, Question
from appliance.core.messaging import Link, Message
from appliance.fleet.identity import Identity, IdentityFolder
from appliance.fleet.part import Asking
from appliance.fleet.renewal_policy import Validity, retry_s, until_due_s
from appliance.security.certificates import certificate_facts, check_certificate, new_request, request_for
from appliance.store.private_files import read_file

LOGGER = logging.getLogger("appliance.fleet")
TRIAL_S = 300.0
"""Without a connection for so long, renewed credentials change places with those before."""
ANSWER_TIMEOUT_S = 30.0

Alarm = Callable[[str, dict[str, Any]], Awaitable[None]]
"""Raises an alarm of a kind, with figures; it reaches the hub when it can."""


class Renewal:
    """A part of the agent that reads no topic."""

    def __init__(
        self,
        folder: IdentityFolder,
        link: Link,
        asking: Asking,
        clock: Clock,
        *,
        now: Callable[[], float],
        reconnect: Callable[[], None],
        alarm: Alarm,
        trial_s: float = TRIAL_S,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        """Watch over a certificate.

        Args:
            folder: Where the identity is.
            link: Tells whether there is a connection.
            asking: Questions to the hub.
            clock: For waits.
            now: Unix seconds, as well as they are known.
            reconnect: Ends the connection, so that the next one is made with the new certificate.
            alarm: Told of each failure.
            trial_s: See `TRIAL_S`.
            uniform: Returns a random number from 0 to 1.
        """
        self._folder = folder
        self._link = link
        self._asking = asking
        self._clock = clock
        self._now = now
        self._reconnect = reconnect
        self._alarm = alarm
        self._trial_s = trial_s
        self._uniform = uniform
        self._fraction = uniform()
        self._failures = 0
        self._again = clock.monotonic()

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return no topic."""
        return frozenset()

    async def handle(self, kind: DownKind, message: Message) -> None:
        """Nothing comes here."""

    async def connected(self) -> None:
        """Settle which credentials work: those of this connection."""
        newer = self._is_newer()
        if not self._folder.confirm_credentials():
            return
        if newer:
            LOGGER.info("the renewed certificate works")
            self._failures = 0
        else:
            self._fail()
            await self._tell("the broker takes the certificate before only, and not the renewed one")

    async def run(self) -> None:
        """Renew whenever it is due, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_valid(), name="certificate renewal")
            tasks.create_task(self._keep_connecting(), name="certificate trial")

    async def _keep_valid(self) -> None:
        while (wait_s := self._wait_s()) is not None:
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            try:
                await self.renew()
            except ApplianceError as error:
                self._fail()
                await self._tell(str(error))

    def _wait_s(self) -> float | None:
        """Return the seconds to wait, 0 to renew now, None if the box has no identity to renew."""
        identity = self._folder.identity()
        if identity is None:
            return None
        if identity.on_trial or not self._link.connected:
            return min(self._trial_s, 10.0)
        due_s = until_due_s(self._validity(identity), now=self._now(), fraction=self._fraction)
        return max(due_s, self._again - self._clock.monotonic(), 0.0)

    async def renew(self) -> None:
        """Renew now.

        Raises:
            UnavailableError: The hub did not answer.
            PermissionDeniedError: It refuses.
            InvalidRequestError: What it sent is no certificate for this box.
            StorageError: The new one cannot be kept.
        """
        identity = self._folder.identity()
        if identity is None:
            return
        key = self._folder.request_key()
        if key is None:
            key, _ = new_request(identity.device)
            self._folder.keep_request_key(key)
        question = Question("renew", body=request_for(identity.device, key).decode())
        answer = await self._asking.ask(question, timeout_s=ANSWER_TIMEOUT_S)
        if not answer.ok:
            raise PermissionDeniedError(
                f"The hub does not renew the certificate of {identity.device}: {answer.detail or answer.code}",
                code="not_approved",
            )
        authority = read_file(identity.authority) or b""
        facts = check_certificate(answer.data, key, authority, identity.device)
        if facts.not_after <= self._validity(identity).ends:
            raise InvalidRequestError("The hub sent a certificate that ends no later than the one in use.")
        self._folder.try_credentials(key + answer.data)
        LOGGER.info("the certificate was renewed; connecting with the new one")
        self._reconnect()

    async def _keep_connecting(self) -> None:
        since = self._clock.monotonic()
        while True:
            await asyncio.sleep(min(1.0, self._trial_s / 2))
            now = self._clock.monotonic()
            if self._link.connected:
                since = now
            elif now - since >= self._trial_s:
                since = now
                if self._folder.exchange_credentials():
                    LOGGER.warning("no connection for %g s: trying the other certificate", self._trial_s)

    def _fail(self) -> None:
        self._failures += 1
        self._again = self._clock.monotonic() + retry_s(self._failures, fraction=self._uniform())

    async def _tell(self, reason: str) -> None:
        LOGGER.error("the certificate was not renewed, try %d: %s", self._failures, reason)
        try:
            await self._alarm("certificate_renewal", {"failures": self._failures, "reason": reason[:500]})
        except ApplianceError as error:
            LOGGER.warning("the alarm certificate_renewal was not kept: %s", error)

    def _is_newer(self) -> bool:
        current, other = self._folder.both_credentials()
        if current is None or other is None:
            return True
        return certificate_facts(current).not_after >= certificate_facts(other).not_after

    def _validity(self, identity: Identity) -> Validity:
        content = read_file(identity.credentials)
        if content is None:
            raise StorageError(f"{identity.credentials} is gone.", advice="Enrol the box anew: appliance fleet enrol.")
        facts = certificate_facts(content)
        return Validity(facts.not_before, facts.not_after)
