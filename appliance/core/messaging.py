"""What the fleet's two ends need of MQTT 5: messages, and a connection to send them over.

`messaging/` holds the real connection; nothing else knows the library behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One MQTT message, sent or received.

    Attributes:
        topic: Without wildcards.
        payload: The bytes; a received one is as hostile as whoever may write to the topic.
        qos: 0 at most once; 1 at least once, as far as the broker: what must arrive is acknowledged by the other end.
        retain: Sent: the broker keeps it for later subscribers. Received: it was kept, and may be old.
        expiry_s: Seconds after which the broker drops it, or None.
        correlation: Ties an answer to its question, or None.
        response_topic: Where an answer is wanted, or None.
    """

    topic: str
    payload: bytes
    qos: Literal[0, 1] = 1
    retain: bool = False
    expiry_s: int | None = None
    correlation: bytes | None = None
    response_topic: str | None = None


@dataclass(frozen=True, slots=True)
class Subscription:
    """Topics to receive, `+` and `#` and `$share/group/…` as in MQTT."""

    topic_filter: str
    qos: Literal[0, 1] = 1


Receive = Callable[[Message], Awaitable[None]]
"""Takes one message. A message of QoS 1 is acknowledged to the broker when this has returned, so whoever writes it to
a database first cannot lose it; whoever is slow is sent no more than the connection's window meanwhile."""


class Link(Protocol):
    """A connection to the broker that comes and goes."""

    @property
    def connected(self) -> bool:
        """Return True while the broker has accepted us and the connection stands."""
        ...

    async def publish(self, message: Message) -> None:
        """Send a message.

        Returns:
            For QoS 1 once the broker has taken it over, for QoS 0 once it is in the socket's buffer.

        Raises:
            UnavailableError: There is no connection, or it broke before the broker confirmed: whether the message
                arrived is not known.
            TooLargeError: It is larger than the broker takes.
        """
        ...
