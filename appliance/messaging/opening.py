"""Opening a socket to the broker: what blocks, on a thread."""

from __future__ import annotations

import contextlib
import socket
import ssl

from appliance.messaging.options import ConnectionOptions


class Opening:
    """Opens a socket on a thread that cannot be cancelled, but can be told to give up: a program's end waits for it."""

    def __init__(self, options: ConnectionOptions) -> None:
        self._options = options
        self._abandoned = False
        self._socket: socket.socket | None = None
        self._opened: socket.socket | None = None

    def open(self) -> socket.socket:
        """Connect and shake hands, each within the timeout."""
        opened = self._connect()
        try:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if isinstance(opened, ssl.SSLSocket):
                self._give_up_if_abandoned()
                opened.do_handshake()
        except BaseException:
            opened.close()
            raise
        self._opened = opened
        if self._abandoned:  # whichever side comes last closes what nobody wants
            opened.close()
        return opened

    def abandon(self) -> None:
        """Let whatever the thread waits for end at once; a name that is being looked up takes its time."""
        self._abandoned = True
        if self._opened is not None:
            self._opened.close()
        elif self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed, or not connected
                # Not TLS's own `shutdown`, which would take away what the handshake works with.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _connect(self) -> socket.socket:
        """Try each of the broker's addresses in turn.

        TLS is put on the socket before it is connected: of one that the broker resets meanwhile, `wrap_socket` would
        leave a descriptor open that nobody has.
        """
        options = self._options
        context = None if options.tls is None else options.tls.context()
        failure: Exception = OSError(f"{options.host} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM
        ):
            opened = socket.socket(family, kind, protocol)
            try:
                if context is not None:
                    opened = context.wrap_socket(opened, server_hostname=options.host, do_handshake_on_connect=False)
                self._socket = opened
                self._give_up_if_abandoned()
                opened.settimeout(options.timeout_s)
                opened.connect(address)
            except (OSError, ValueError) as error:  # the latter of a name that TLS cannot check
                opened.close()
                failure = error
            else:
                return opened
        raise failure

    def _give_up_if_abandoned(self) -> None:
        if self._abandoned:
            raise OSError("it is not wanted any more")
