"""How a box gets an identity at a hub: it makes a key that never leaves it, and asks with a claim for its certificate.

    claim.json ─▶ request-key.pem ─▶ Claim ─▶ waiting … issued ─▶ checked ─▶ credentials.pem

Each arrow may be the last that happens before the power goes: whoever calls `enrol` again goes on from there, with the
same key, and the hub answers the same request with the same certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import (
    ApplianceError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from appliance.core.fleet import CLAIM_ANSWER, CLAIM_REQUEST, Claim, ClaimAnswer, ClaimBundle
from appliance.core.messaging import Message, Subscription
from appliance.fleet.identity import Identity, IdentityFolder, PendingClaim
from appliance.messaging.connection import Connection, ConnectionOptions, TlsFiles
from appliance.security.certificates import CLAIM_NAME, check_certificate, new_request, request_for
from appliance.store.private_files import read_file

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 20.0
ANSWER_TIMEOUT_S = 6.0
SHORTEST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0

_LARGEST_BUNDLE_BYTES = 1024 * 1024

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pauses:
    """Between two questions: the longest possible doubles from twice `shortest_s` to `longest_s`.

    The first is random already: the broker knows claims by one name only, so boxes that ask at the same time push each
    other off, and would go on to do so in step.
    """

    shortest_s: float = SHORTEST_PAUSE_S
    longest_s: float = LONGEST_PAUSE_S

    def after(self, times: int, fraction: float) -> float:
        """Return the pause after so many questions; `fraction` is random, from 0 to 1."""
        ceiling = min(self.longest_s, self.shortest_s * 2.0 ** (1 + min(times, 16)))
        return self.shortest_s + fraction * (ceiling - self.shortest_s)


def read_bundle(path: Path, *, now: float) -> ClaimBundle:
    """Return the claim bundle in a file.

    Raises:
        NotFoundError: There is no such file.
        InvalidRequestError: It is no claim bundle, or has expired.
    """
    content = read_file(path, most_bytes=_LARGEST_BUNDLE_BYTES)
    if content is None:
        raise NotFoundError(f"There is no file {path}.", advice="`appliance hub ca claim FILE` makes one, on the hub.")
    try:
        bundle = msgspec.json.decode(content, type=ClaimBundle)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(
            f"{path} is no claim bundle: {error}.", advice="`appliance hub ca claim FILE` makes one, on the hub."
        ) from error
    if 0 < bundle.expires <= now:
        raise InvalidRequestError(
            f"The claim in {path} has expired.",
            advice="Have a new one made on the hub: appliance hub ca claim. Or is this box's clock wrong?",
        )
    return bundle


def begin(folder: IdentityFolder, device: str, bundle: ClaimBundle) -> PendingClaim | None:
    """Note that the box wants to become a device; return None if it is that device at that hub already.

    Raises:
        ConflictError: The box is enrolled at another hub, or under another id.
    """
    folder.tidy()
    there = folder.identity()
    if there is not None:
        if (there.device, there.host, there.port) == (device, bundle.host, bundle.port):
            return None
        raise ConflictError(
            f"This box is {there.device!r} at {there.host}:{there.port} already.",
            advice="To enrol it anew: appliance fleet leave, then appliance fleet enrol BUNDLE.",
        )
    pending = PendingClaim(device, bundle)
    if folder.pending() != pending:
        folder.begin(pending)
    return pending


async def enrol(
    folder: IdentityFolder,
    pending: PendingClaim,
    *,
    facts: Mapping[str, Any],
    clock: Clock,
    say: Say = logger.info,
    pauses: Pauses | None = None,
) -> Identity:
    """Ask until the hub has issued a certificate, and become that device; whoever waits has a deadline of his own.

    Args:
        folder: Where the identity is kept.
        pending: From `begin` or `IdentityFolder.pending`.
        facts: For the operator who approves.
        clock: For the validity of what comes.
        say: Told what is waited for, each time it changes.
        pauses: Between two questions.

    Raises:
        PermissionDeniedError: The hub refuses; the message has its reason.
        InvalidRequestError: What the hub sent is no certificate for this box.
        StorageError: The identity cannot be kept.
    """
    pauses = pauses or Pauses()
    times, said = 0, ""
    while True:
        try:
            answer = await _ask(folder, pending, facts)
        except UnavailableError as error:
            status, detail = "waiting", str(error)
        else:
            if answer.status == "issued":
                return _become(folder, pending, answer.certificate, clock.unix())
            status, detail = answer.status, answer.detail
        if status == "refused":
            raise PermissionDeniedError(
                f"The hub refuses to enrol this box as {pending.device!r}: {detail or 'it gave no reason'}",
                code="not_approved",
            )
        if detail != said:
            say(detail or "The hub has not decided yet.")
            said = detail
        await asyncio.sleep(pauses.after(times, random.random()))  # noqa: S311  (it spreads load and keeps no secret)
        times += 1


def _become(folder: IdentityFolder, pending: PendingClaim, chain: str, now: float) -> Identity:
    key = folder.request_key() or b""
    facts = check_certificate(chain.encode(), key, pending.bundle.authority.encode(), pending.device)
    if facts.expired(now):
        raise InvalidRequestError(
            f"The hub sent a certificate for {pending.device!r} that has expired.",
            advice="Is this box's clock right? The hub's?",
        )
    folder.enrol(pending, key + chain.encode())
    identity = folder.identity()
    assert identity is not None, "it was just written"
    return identity


async def _ask(folder: IdentityFolder, pending: PendingClaim, facts: Mapping[str, Any]) -> ClaimAnswer:
    """Ask once.

    Raises:
        UnavailableError: The broker or the hub does not answer.
    """
    key = folder.request_key()
    if key is None:
        key, _ = new_request(pending.device)
        folder.keep_request_key(key)
    bundle = pending.bundle
    request = request_for(pending.device, key).decode()
    claim = Claim(bundle.token, pending.device, request, folder.instance(), dict(facts))
    nonce = secrets.token_hex(16)
    answers: asyncio.Queue[ClaimAnswer | None] = asyncio.Queue()

    async def receive(message: Message) -> None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answers.put_nowait(msgspec.json.decode(message.payload, type=ClaimAnswer))

    async def broken(_: str) -> None:
        answers.put_nowait(None)

    credentials, authority = folder.claim_credentials(pending)
    options = ConnectionOptions(bundle.host, bundle.port, CLAIM_NAME, TlsFiles(authority, credentials, credentials))
    connection = Connection(
        options, receive, subscriptions=[Subscription(f"{CLAIM_ANSWER}/{nonce}")], on_disconnected=broken
    )

    async def exchange() -> ClaimAnswer:
        message = Message(f"{CLAIM_REQUEST}/{nonce}", msgspec.json.encode(claim), expiry_s=60)
        while not answers.empty():
            answers.get_nowait()
        await connection.publish(message)
        answer = await answers.get()
        if answer is None:  # to come back at once would only push off whoever else is being enrolled
            raise UnavailableError("The connection broke: other boxes may be enrolling with the same claim.")
        return answer

    return await while_connected(connection, exchange)


async def while_connected(connection: Connection, work: Callable[[], Awaitable[T]]) -> T:
    """Connect, do some work, and leave.

    Raises:
        UnavailableError: There was no connection within `CONNECT_TIMEOUT_S`, or the work took too long.
    """
    results: list[T] = []
    failures: list[ApplianceError] = []

    async def in_time() -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await connection.until_connected()
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                results.append(await work())
        except TimeoutError:
            silent = "The hub" if connection.connected else "The broker"
            failures.append(UnavailableError(f"{silent} did not answer in time.", advice="Look whether it runs."))
        except ApplianceError as error:
            failures.append(error)

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(connection.run(), name="enrolment")
        await in_time()
        running.cancel()
    if failures:
        raise failures[0]
    return results[0]
