"""Ends the connections that revoked devices still have: a broker asks for a certificate only when somebody connects.

The hub connects in the device's name, with a certificate of its own authority that is valid for minutes: the broker
ends the older connection of that name and forgets what it kept for it. By then it has read the list of the revoked, so
the device does not come back. If it was never told to read it (its process is not known here) the device does, and is
heard; whoever is heard after his connection was ended is ended again, until the broker refuses him.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from appliance.core.clock import Clock
from appliance.hub.enrolment_records import Barred
from appliance.messaging.options import ConnectionOptions, TlsFiles
from appliance.messaging.session import Session
from appliance.security.certificates import Authority
from appliance.store.private_files import write_file

logger = logging.getLogger("appliance.hub")

VALID_S = 600.0
KEPT_S = 3600.0
"""So long the broker keeps a device's session; who was revoked before that has none, unless he is heard."""
AGAIN_S = 15.0
"""Who was heard sooner after the end of his connection may have been heard before it: it is noted every ten seconds."""


class Takeovers:
    """Ends connections, and notes when."""

    def __init__(
        self,
        barred: Callable[[], Sequence[Barred]],
        authority: Authority,
        options: ConnectionOptions,
        clock: Clock,
        *,
        say_lost: Callable[[str], Awaitable[None]],
    ) -> None:
        """Connect to nobody before `run_once`.

        Args:
            barred: Returns the devices that have no valid certificate any more.
            authority: Of the fleet.
            options: How the hub itself connects.
            clock: For what is due.
            say_lost: Awaited with each device whose connection was ended.
        """
        self._barred = barred
        self._authority = authority
        self._options = options
        self._clock = clock
        self._say_lost = say_lost
        self._ended: dict[str, float] = {}

    async def run_once(self) -> Sequence[str]:
        """End what connections are due, and return whose.

        Raises:
            UnavailableError: The broker cannot be reached, or refuses.
            StorageError: The database or the disk failed.
        """
        barred = {each.device: each for each in self._barred()}
        self._ended = {device: at for device, at in self._ended.items() if device in barred}
        done: list[str] = []
        for each in barred.values():
            if is_due(each, self._ended.get(each.device), self._clock.unix()):
                await end_session(self._options, self._authority, each.device, self._clock.unix())
                await self._say_lost(each.device)
                self._ended[each.device] = self._clock.unix()
                done.append(each.device)
                logger.info("the connection of %s, which is revoked, was ended", each.device)
        return done


def is_due(barred: Barred, ended: float | None, now: float) -> bool:
    """Return whether the connection that a revoked device may have is to be ended.

    Args:
        barred: Who.
        ended: When it was ended last, or None.
        now: Unix seconds.
    """
    if ended is None:
        return now - barred.revoked < KEPT_S or barred.seen > barred.revoked
    return now - ended > AGAIN_S and barred.seen > ended


async def end_session(options: ConnectionOptions, authority: Authority, device: str, now: float) -> None:
    """Have the broker end the connection of a device and forget its session.

    Raises:
        UnavailableError: The broker cannot be reached, or refuses.
        StorageError: There is no place for the certificate.
    """
    assert options.tls is not None, "the hub connects with certificates"
    identity = authority.client(device, now, VALID_S)
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder) / "certificate.pem", Path(folder) / "key.pem"
        write_file(key, identity.key)
        write_file(certificate, identity.certificate)
        session = await Session.open(
            replace(
                options,
                client_id=device,
                tls=TlsFiles(options.tls.authority, certificate, key),
                clean_start=True,
                session_expiry_s=0,
            ),
            None,
            _drop,
        )
    session.close(with_will=False)


def _drop(*_: object) -> None:
    """Take a message of the device's: nothing was subscribed to, so none comes."""
