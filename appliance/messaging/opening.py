"""Opening a socket to the broker: what blocks, on a thread."""

from __future__ import annotations

import socket

from appliance.messaging.options import ConnectionOptions


class Opening:
    """Opens a socket on a thread that cannot be cancelled; whichever side comes last closes what nobody wants."""

    def __init__(self, options: ConnectionOptions) -> None:
        self._options = options
        self._abandoned = False
        self._opened: socket.socket | None = None

    def open(self) -> socket.socket:
        """Connect and shake hands, each within the timeout."""
        options = self._options
        opened = socket.create_connection((options.host, options.port), timeout=options.timeout_s)
        try:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if options.tls is not None:
                opened = options.tls.context().wrap_socket(
                    opened, server_hostname=options.host, do_handshake_on_connect=False
                )
                opened.do_handshake()
        except BaseException:
            opened.close()
            raise
        self._opened = opened
        if self._abandoned:
            opened.close()
        return opened

    def abandon(self) -> None:
        """Close the socket, now or when it is there."""
        self._abandoned = True
        if self._opened is not None:
            self._opened.close()
