"""Each message to the part that reads its topic, or refused at the door.

A device's id is taken from its topic, where the broker let nobody else write; what a payload says of itself proves
nothing. What is malformed or too large is counted, and logged at most once a minute for each device: whoever sends
nonsense all day must fill no disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast, get_args

from appliance.core.clock import Clock
from appliance.core.fleet import DEVICE_ID, LARGEST_BATCH_BYTES, LARGEST_DOCUMENT_BYTES, ROOT, UpKind
from appliance.core.messaging import Message, Receive, Subscription
from appliance.core.printable import printable
from appliance.hub.part import HubPart

logger = logging.getLogger("appliance.hub")

UP = f"{ROOT}/up/"
KINDS: frozenset[str] = frozenset(get_args(UpKind))
LARGEST_BYTES = max(LARGEST_BATCH_BYTES, LARGEST_DOCUMENT_BYTES)

LOG_EVERY_S = 60.0
DEVICES_REMEMBERED = 10_000
"""Of whom it is known when they were last complained of."""


class Counting(Protocol):
    """What is counted of messages."""

    def received(self, kind: str) -> None:
        """Count a message of a kind of topic."""
        ...

    def refused(self, reason: str) -> None:
        """Count a message that nobody read; the reason is one of a few slugs."""
        ...


class Complaints:
    """Says what is wrong with devices' messages, seldom."""

    def __init__(self, clock: Clock, counting: Counting) -> None:
        self._clock = clock
        self._counting = counting
        self._said: dict[str, float] = {}

    def refuse(self, device: str, reason: str, detail: str) -> None:
        """Count a message that was refused, and log it unless this device was complained of a short while ago.

        Args:
            device: Whose message it was, as far as that is known.
            reason: A slug of ours.
            detail: For a person; may hold what was sent.
        """
        self._counting.refused(reason)
        now = self._clock.monotonic()
        if now - self._said.get(device, -LOG_EVERY_S) < LOG_EVERY_S:
            return
        if len(self._said) >= DEVICES_REMEMBERED:
            self._said = {each: at for each, at in self._said.items() if now - at < LOG_EVERY_S}
        if len(self._said) < DEVICES_REMEMBERED:
            self._said[device] = now
        logger.warning("A message of %s was refused (%s): %s", printable(device)[:100], reason, printable(detail[:300]))


class Dispatcher:
    """Knows who reads what."""

    def __init__(self, parts: Sequence[HubPart], complaints: Complaints, counting: Counting, clock: Clock) -> None:
        """Give each topic to its reader.

        Raises:
            ValueError: Two parts want the same topic.
        """
        self._readers: dict[str, HubPart] = {}
        for part in parts:
            if taken := part.kinds & self._readers.keys():
                raise ValueError(f"{sorted(taken)} have two readers")
            self._readers.update(dict.fromkeys(part.kinds, part))
        self._others: dict[str, Receive] = {}
        self._complaints = complaints
        self._counting = counting
        self._clock = clock
        self._seen: dict[str, float] = {}

    def listen(self, prefix: str, receive: Receive) -> None:
        """Give the topics below a prefix outside of the devices' own branch, such as the claims', to somebody."""
        self._others[prefix.rstrip("/") + "/"] = receive

    def subscriptions(self, shared_group: str = "") -> Sequence[Subscription]:
        """Return what to subscribe to: the topics that have a reader, each message once for all of a group."""
        prefix = f"$share/{shared_group}/" if shared_group else ""
        return [Subscription(prefix + each) for each in (*self._filters(), *(f"{each}#" for each in self._others))]

    def take_seen(self) -> Mapping[str, float]:
        """Return when devices last said anything since the last call, in Unix seconds."""
        seen, self._seen = self._seen, {}
        return seen

    async def receive(self, message: Message) -> None:
        """Take one message; when this returns, the broker may forget it.

        Raises:
            StorageError: It could not be kept.
        """
        for prefix, receive in self._others.items():
            if message.topic.startswith(prefix):
                self._counting.received("claim")
                if self._fits(prefix, message):
                    await receive(message)
                return
        device, _, path = message.topic.removeprefix(UP).partition("/")
        kind, _, rest = path.partition("/")
        if not message.topic.startswith(UP) or not DEVICE_ID.fullmatch(device):
            self._complaints.refuse("nobody", "bad_topic", message.topic)
            return
        reader = self._readers.get(kind)
        if reader is None:
            self._complaints.refuse(device, "bad_topic", message.topic)
            return
        self._counting.received(kind)
        if not self._fits(device, message):
            return
        if not message.retain:
            self._seen[device] = self._clock.unix()
        await reader.handle(device, cast("UpKind", kind), rest, message)

    def _fits(self, device: str, message: Message) -> bool:
        if len(message.payload) <= LARGEST_BYTES:
            return True
        detail = f"{len(message.payload)} bytes where {LARGEST_BYTES} are allowed"
        self._complaints.refuse(device, "too_large", detail)
        return False

    def _filters(self) -> Iterable[str]:
        return (f"{UP}+/{kind}" if kind in _WITHOUT_REST else f"{UP}+/{kind}/#" for kind in sorted(self._readers))


_WITHOUT_REST = frozenset({"state", "rep", "res", "req", "blk"})
"""Kinds of topics that end there; the others name a job or a stream."""
