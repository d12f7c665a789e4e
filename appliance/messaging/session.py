"""One connection to the broker, from its CONNECT to its end; the only file that knows paho-mqtt.

paho runs without a thread: its socket is watched by the event loop. Each connection has a client of its own, so nothing
is left over from the one before: what was not confirmed is an error to whoever sent it, and paho resends nothing.

Over 400 lines because all that knows the library is in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from appliance.core.errors import InvalidRequestError, PermissionDeniedError, TooLargeError, UnavailableError
from appliance.core.messaging import Message, Subscription
from appliance.messaging.gathered_socket import PIECE_BYTES, GatheredSocket
from appliance.messaging.opening import Opening
from appliance.messaging.options import ConnectionOptions, Will
from appliance.messaging.watcher import BROKEN, READABLE, WRITABLE, Watcher, watcher

LOGGER = logging.getLogger("appliance.messaging")

LARGEST_MQTT_PACKET = 268_435_455
_PACKETS_AT_ONCE = 64
_FIXED_BYTES = 1 + 4 + 2 + 2 + 1  # type, remaining length, length of the topic, packet id, length of the properties
_NOT_AUTHORISED = 0x87
_PACKET_TOO_LARGE = 0x95
_WITH_WILL = 0x04
_FAILURES_FROM = 0x80


Arrived = Callable[["Session", Message, int], None]
"""Takes a message as it comes in, with its packet id, 0 for QoS 0."""


class Session:
    """Use `open`; it ends by itself when the connection breaks, or by `close`.

    Attributes:
        ended: Set at the end.
        reason: Why it ended.
        on_end: Called at the end; for whoever does not want to wait for `ended`.
        largest_packet: What the broker takes, in bytes.
        resumed: The broker had kept our session, with its subscriptions and what came for them.
    """

    def __init__(self, options: ConnectionOptions, will: Will | None, arrived: Arrived) -> None:
        self.ended = asyncio.Event()
        self.reason = ""
        self.on_end: Callable[[], None] | None = None
        self.largest_packet = LARGEST_MQTT_PACKET
        self.resumed = False
        self._options = options
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._client = _client(options)
        self._socket: GatheredSocket | None = None
        self._descriptor = -1
        self._watcher: Watcher | None = None
        self._write_due = False
        self._flushing: asyncio.TimerHandle | None = None
        self._flushed_at = float("-inf")
        self._paused = False
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._confirmations: dict[int, asyncio.Future[ReasonCode]] = {}
        self._grants: dict[int, asyncio.Future[list[ReasonCode]]] = {}
        self._window = asyncio.Semaphore(options.most_in_flight)
        self._unacknowledged: OrderedDict[int, bool] = OrderedDict()
        self._properties = _connect_properties(options, will)
        if will is not None:
            _set_will(self._client, will)

    @classmethod
    async def open(cls, options: ConnectionOptions, will: Will | None, arrived: Arrived) -> Session:
        """Connect, and return once the broker has accepted us.

        Raises:
            UnavailableError: It cannot be reached, is not who it should be, or refuses us; the message says which.
        """
        session = cls(options, will, arrived)
        try:
            await session._connect()
        except BaseException:
            session.close(with_will=False)
            raise
        return session

    async def _connect(self) -> None:
        where = f"The broker at {self._options.host}:{self._options.port}"
        try:
            self._client.socket_to_use = self._socket = GatheredSocket(await self._open_socket())
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{where} cannot be reached: {error}.") from error
        self._watch()
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._accepted
        except TimeoutError as error:
            raise UnavailableError(f"{where} did not answer within {self._options.timeout_s:g} s.") from error

    async def _open_socket(self) -> socket.socket:
        opening = Opening(self._options)
        try:
            return await asyncio.to_thread(opening.open)  # resolving, connecting and shaking hands block
        except asyncio.CancelledError:
            opening.abandon()
            raise

    def _watch(self) -> None:
        client = self._client
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_socket_register_write = self._on_writing
        client.on_socket_close = self._on_closing
        client.on_socket_open = self._on_opened
        options = self._options
        client.connect(
            options.host,
            options.port,
            options.keepalive_s,
            clean_start=options.clean_start,
            properties=self._properties,
        )

    def _unwatch(self) -> None:
        if self._descriptor >= 0 and self._watcher is not None:
            self._watcher.forget(self._descriptor)
            self._descriptor = -1

    def pause(self) -> None:
        """Read no further, so that TCP holds the broker up; that it seems silent then is no reason to give it up."""
        self._paused = True
        if self._watcher is not None:
            self._watcher.want_reading(self._descriptor, False)

    def resume(self) -> None:
        """Read on after `pause`."""
        self._paused = False
        if self._watcher is not None:
            self._watcher.want_reading(self._descriptor, True)
        self._loop.call_soon(self._read)  # what has been read off the socket already wakes no one up

    def _ready(self, events: int) -> None:
        if self._paused and events & BROKEN:
            self._end("reset by the broker")
            return
        if events & WRITABLE:
            self._flush()
            self._write()
        if events & READABLE:
            self._read()

    def _read(self) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            if self._paused or self.ended.is_set() or not self._drive(self._client.loop_read):
                return
            if self._socket is None or not self._socket.pending():
                return
        self._loop.call_soon(self._read)

    def _write(self) -> None:
        """Hand over what paho has to say; it is sent when it was gathered long enough, or fills a piece."""
        self._write_due = False
        if self.ended.is_set() or self._socket is None or not self._drive(self._client.loop_write):
            return
        wait_s = self._flushed_at + self._options.gather_s - self._loop.time()
        if wait_s <= 0 or self._socket.unsent >= PIECE_BYTES:
            self._flush()
        elif self._flushing is None:
            self._flushing = self._loop.call_later(wait_s, self._flush)

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if self.ended.is_set() or self._socket is None or self._watcher is None:
            return
        self._flushed_at = self._loop.time()
        try:
            self._socket.flush()
        except OSError as error:
            self._end(f"nothing can be sent any more: {error}")
            return
        self._watcher.want_writing(self._descriptor, self._client.want_write() or self._socket.unsent > 0)

    def _drive(self, step: Callable[[], MQTTErrorCode]) -> bool:
        try:
            code = step()
        except Exception:
            LOGGER.exception("The connection to the broker failed on something it sent.")
            self._end("a packet could not be read")
            return False
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or self._client.socket() is None:
            self._end(code.name.removeprefix("MQTT_ERR_").replace("_", " ").lower())
            return False
        return True

    async def keep_alive(self) -> None:
        """Send a ping when it is time for one, and notice that none is answered, until the session ends."""
        pause = max(0.2, self._client.keepalive / 8)
        while not self.ended.is_set():
            self.tick()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self.ended.wait()

    def tick(self) -> None:
        """Do what `keep_alive` does once: for whoever has thousands of sessions and calls this now and then."""
        if not self.ended.is_set() and not self._paused:
            self._drive(self._client.loop_misc)

    async def subscribe(self, subscriptions: Sequence[Subscription], *, anew: bool = True) -> None:
        """Subscribe, and return once the broker has granted it all.

        Args:
            subscriptions: To what.
            anew: Have what the broker keeps (retained) sent also for subscriptions that it already has.

        Raises:
            UnavailableError: It refused one, did not answer in time, or the connection broke.
        """
        if not subscriptions:
            return
        kept = SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if anew else SubscribeOptions.RETAIN_SEND_IF_NEW_SUB
        code, packet = self._client.subscribe(
            [(each.topic_filter, SubscribeOptions(qos=each.qos, retainHandling=kept)) for each in subscriptions]
        )
        if packet is None or self.ended.is_set():
            raise UnavailableError(f"The connection to the broker broke: {self.reason or code.name}.")
        granted = self._grants[packet] = self._loop.create_future()
        try:
            async with asyncio.timeout(self._options.timeout_s):
                codes = await granted
        except TimeoutError as error:
            raise UnavailableError(
                f"The broker did not grant subscriptions in {self._options.timeout_s:g} s."
            ) from error
        refused = [
            f"{each.topic_filter} ({code})"
            for each, code in zip(subscriptions, codes, strict=False)
            if code.value >= _FAILURES_FROM
        ]
        if refused:
            raise UnavailableError(f"The broker refused subscriptions: {', '.join(refused)}.")

    async def publish(self, message: Message) -> None:
        """Send a message; see `core.messaging.Link.publish`."""
        properties, size = _publish_properties(message)
        size += _FIXED_BYTES + len(message.topic.encode()) + len(message.payload)
        if size > self.largest_packet:
            raise TooLargeError(
                f"The message on {message.topic} is too large: {size:,} bytes, and the broker takes at most "
                f"{self.largest_packet:,}."
            )
        await self._window.acquire()
        packet = self._send(message, properties)
        confirmed = self._confirmations[packet] = self._loop.create_future()
        code = await confirmed
        if code.value >= _FAILURES_FROM:
            raise _refusal(message, code)

    def _send(self, message: Message, properties: Properties | None) -> int:
        code = MQTTErrorCode.MQTT_ERR_NO_CONN
        if not self.ended.is_set():
            try:
                info = self._client.publish(message.topic, message.payload, message.qos, message.retain, properties)
            except ValueError as error:
                self._window.release()
                raise InvalidRequestError(f"The message on {message.topic!r} cannot be sent: {error}") from error
            code = info.rc
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._window.release()
            raise UnavailableError(f"The connection to the broker broke: {self.reason or code.name}.")
        return info.mid

    def acknowledge(self, packet: int) -> None:
        """Acknowledge a message of QoS 1; the broker hears of it once all before it are, as MQTT 5 (4.6) demands."""
        if packet not in self._unacknowledged:
            return
        self._unacknowledged[packet] = True
        while self._unacknowledged:
            first, done = next(iter(self._unacknowledged.items()))
            if not done or self.ended.is_set():
                return
            del self._unacknowledged[first]
            self._client.ack(first, 1)

    def close(self, *, with_will: bool) -> None:
        """End the session; the broker keeps the Will to itself unless it is asked for."""
        if not self.ended.is_set() and self._client.socket() is not None:
            reason = ReasonCode(PacketTypes.DISCONNECT, identifier=_WITH_WILL if with_will else 0)
            with contextlib.suppress(Exception):
                self._client.disconnect(reason)
                self._client.loop_write()
        self.abort()

    def abort(self) -> None:
        """End the session without a word, as a power cut does."""
        self._end("closed")
        if self._socket is not None:
            self._socket.abort()

    def give_up(self, reason: str) -> None:
        """End the session soon, for what came in over it; the broker sends again what was not acknowledged."""
        self.reason = reason
        self._loop.call_soon(lambda: self.close(with_will=True))  # not from within paho's callback

    def _end(self, reason: str) -> None:
        if self.ended.is_set():
            return
        self.reason = self.reason or reason
        self.ended.set()
        if self._flushing is not None:
            self._flushing.cancel()
        if self.on_end is not None:
            self.on_end()
        self._unwatch()
        error = UnavailableError(f"The connection to the broker broke: {self.reason}.")
        waiting: list[asyncio.Future[Any]] = [self._accepted, *self._confirmations.values(), *self._grants.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever was cancelled meanwhile does not ask for it
        self._confirmations.clear()
        self._grants.clear()
        self._window.release()  # each who waits wakes the next, and finds that it is over

    def _on_opened(self, _client: Client, _data: object, opened: Any) -> None:
        self._descriptor = opened.fileno()
        self._watcher = watcher()
        self._watcher.watch(self._descriptor, self._ready)

    def _on_writing(self, _client: Client, _data: object, _socket: object) -> None:
        """Write at the end of this turn of the loop, all that was said in it: the socket nearly always has room."""
        if not self._write_due:
            self._write_due = True
            self._loop.call_soon(self._write)

    def _on_closing(self, _client: Client, _data: object, _socket: object) -> None:
        self._unwatch()

    def _on_connect(
        self, _client: Client, _data: object, flags: ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        if self._accepted.done():
            return
        if code.value >= _FAILURES_FROM:
            self._accepted.set_exception(UnavailableError(f"The broker refused the connection: {code}."))
            return
        self.resumed = flags.session_present
        self.largest_packet = getattr(properties, "MaximumPacketSize", LARGEST_MQTT_PACKET)
        most = min(self._options.most_in_flight, getattr(properties, "ReceiveMaximum", 65_535))
        self._window = asyncio.Semaphore(most)  # no one waits for it yet
        self._accepted.set_result(None)

    def _on_disconnect(
        self, _client: Client, _data: object, _flags: DisconnectFlags, code: ReasonCode, _properties: Properties | None
    ) -> None:
        self.reason = self.reason or str(code)

    def _on_subscribe(
        self, _client: Client, _data: object, packet: int, codes: list[ReasonCode], _properties: Properties | None
    ) -> None:
        granted = self._grants.pop(packet, None)
        if granted is not None and not granted.done():
            granted.set_result(codes)

    def _on_publish(
        self, _client: Client, _data: object, packet: int, code: ReasonCode, _properties: Properties | None
    ) -> None:
        confirmed = self._confirmations.pop(packet, None)
        if confirmed is None:
            return
        self._window.release()
        if not confirmed.done():
            confirmed.set_result(code)

    def _on_message(self, _client: Client, _data: object, received: MQTTMessage) -> None:
        if received.qos:
            self._unacknowledged[received.mid] = False
        self._arrived(self, _message(received), received.mid if received.qos else 0)


class _Client(Client):
    """paho's client, with a socket that we have opened: its own way leaks one when the handshake fails, and blocks."""

    socket_to_use: GatheredSocket

    def _create_socket(self) -> Any:
        return self.socket_to_use


def _client(options: ConnectionOptions) -> _Client:
    client = _Client(
        CallbackAPIVersion.VERSION2,
        client_id=options.client_id,
        protocol=MQTTProtocolVersion.MQTTv5,
        reconnect_on_failure=False,
        manual_ack=True,
    )
    client.max_inflight_messages = 0  # the window here bounds them
    return client


def _connect_properties(options: ConnectionOptions, will: Will | None) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = max(options.session_expiry_s, will.delay_s if will is not None else 0)
    properties.ReceiveMaximum = options.receive_maximum
    properties.MaximumPacketSize = options.largest_packet_bytes
    return properties


def _set_will(client: Client, will: Will) -> None:
    properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
    properties.WillDelayInterval = will.delay_s
    if will.message.expiry_s is not None:
        properties.MessageExpiryInterval = will.message.expiry_s
    client.will_set(will.message.topic, will.message.payload, will.message.qos, will.message.retain, properties)


def _publish_properties(message: Message) -> tuple[Properties | None, int]:
    """Return the properties of a message and their size, None and 0 if it has none."""
    if message.expiry_s is None and message.correlation is None and message.response_topic is None:
        return None, 0
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = message.expiry_s
    if message.correlation is not None:
        properties.CorrelationData = message.correlation
    if message.response_topic is not None:
        properties.ResponseTopic = message.response_topic
    try:
        return properties, len(properties.pack())  # type: ignore[no-untyped-call]
    except (struct.error, UnicodeError) as error:
        raise InvalidRequestError(f"The message on {message.topic} has impossible properties: {error}.") from error


def _message(received: MQTTMessage) -> Message:
    """Return a received message.

    Raises:
        UnicodeDecodeError: Its topic is no UTF-8.
    """
    properties = received.properties
    return Message(
        topic=received.topic,
        payload=bytes(received.payload),
        qos=1 if received.qos else 0,
        retain=received.retain,
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
        correlation=getattr(properties, "CorrelationData", None),
        response_topic=getattr(properties, "ResponseTopic", None),
    )


def _refusal(message: Message, code: ReasonCode) -> PermissionDeniedError | TooLargeError | UnavailableError:
    said = f"The broker refused the message on {message.topic}: {code}."
    if code.value == _NOT_AUTHORISED:
        return PermissionDeniedError(said, advice="The certificate's name may not write there.")
    if code.value == _PACKET_TOO_LARGE:
        return TooLargeError(said)
    return UnavailableError(said)
