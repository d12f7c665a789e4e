"""How to connect to the broker: where, as whom, with what last will, within what limits."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from appliance.core.messaging import Message


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Mutual TLS, PEM files; read anew at each connecting, so that a renewed certificate needs no restart.

    Attributes:
        authority: Certificates that may have signed the broker's.
        certificate: Our own, with its chain.
        key: Our private key.
    """

    authority: Path
    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """Return a context for TLS 1.2 or newer that checks the broker's certificate and name.

        Raises:
            OSError: A file is missing or not what it should be.
        """
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(self.authority))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        return context


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says in our name when the connection is lost, at least `delay_s` after that."""

    message: Message
    delay_s: int = 0


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How to connect.

    Attributes:
        host: Name or address of the broker; its certificate must be for it.
        port: TCP port.
        client_id: Ours; the broker replaces it by the name in our certificate.
        tls: None is a plain connection, for a broker on this machine.
        keepalive_s: A dead connection is noticed after at most about twice that.
        clean_start: Forget what the broker kept of our session.
        session_expiry_s: How long the broker keeps our session when we are away; never shorter than the Will's delay,
            for a session's end sends the Will at once.
        receive_maximum: Messages of QoS 1 that the broker may send us before we have acknowledged one.
        largest_packet_bytes: The broker sends us no larger one.
        gather_s: What is said within so long of the last time that something was sent goes out in one piece, for a
            client that says a lot; what is said after a pause goes out at once.
        most_in_flight: Messages that are being sent at the same time; more of them wait.
        timeout_s: Longest wait for each of name and socket, TLS, the broker's acceptance and subscriptions.
    """

    host: str
    port: int
    client_id: str
    tls: TlsFiles | None = None
    keepalive_s: int = 60
    clean_start: bool = True
    session_expiry_s: int = 0
    receive_maximum: int = 64
    largest_packet_bytes: int = 2 * 1024 * 1024
    gather_s: float = 0.0
    most_in_flight: int = 64
    timeout_s: float = 10.0
