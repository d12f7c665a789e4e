"""The listening server: uvicorn's connections on sockets, TLS and shutdown of our own.

uvicorn's own server would install signal handlers and exit the process when it cannot listen; both belong to
`compose.py`, so only its configuration and its connections are used.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from uvicorn.config import Config

from appliance.core.errors import SettingsError
from appliance.web.protocol import ConnectionState, LimitedHttpProtocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from appliance.web.server_settings import ServerSettings

BACKLOG = 2048
"""Connections that the kernel holds until they are accepted; Linux cuts this to its own limit."""

logger = logging.getLogger("appliance.api")


class HttpServer:
    """Serves one application on `settings.host` and `settings.port` until `stop`."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, *, client_authority: Path | None = None) -> None:
        """Read the TLS files, if any are set.

        Args:
            app: Answers.
            settings: Where to listen, and the limits.
            client_authority: PEM file; with it every client has to show a certificate that this authority has signed.

        Raises:
            SettingsError: A TLS file is missing or not valid.
        """
        self._settings = settings
        self._tls = _tls_context(settings, client_authority)
        self._config = _uvicorn_config(app, settings)
        self._state = ConnectionState()
        self._stopping = asyncio.Event()

    async def serve(self, on_listening: Callable[[int], None]) -> None:
        """Listen, call back once with the real port, and return after `stop` when every request has ended.

        Raises:
            SettingsError: The address cannot be listened on.
        """
        server = await self._listen()
        try:
            on_listening(server.sockets[0].getsockname()[1])
            await self._stopping.wait()
            server.close()
            await self._finish()
        finally:
            server.close()
            self.abort()

    def stop(self) -> None:
        """Stop accepting connections; open requests finish, idle connections are closed. Idempotent."""
        self._stopping.set()

    def abort(self) -> None:
        """Cut every open connection. The requests on them are cancelled as if their clients had left."""
        for connection in list(self._state.connections):
            transport = cast("asyncio.Transport | None", connection.transport)
            if transport is not None:
                transport.abort()

    async def _listen(self) -> asyncio.Server:
        settings = self._settings
        try:
            return await asyncio.get_running_loop().create_server(
                lambda: LimitedHttpProtocol(self._config, self._state, settings),
                host=settings.host,
                port=settings.port,
                backlog=BACKLOG,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else settings.header_timeout_s,
            )
        except OSError as error:
            raise SettingsError(
                f"Cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}.",
                advice="Another program may have the port: stop it, or choose another with --port; "
                "`appliance doctor` looks.",
                param="port",
            ) from error

    async def _finish(self) -> None:
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._state.drained.wait()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks))


def _uvicorn_config(app: ASGIApp, settings: ServerSettings) -> Config:
    config = Config(
        app=cast("Any", app),
        http=LimitedHttpProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=cast("int", settings.keep_alive_timeout_s),
    )
    config.load()
    return config


def _tls_context(settings: ServerSettings, client_authority: Path | None) -> ssl.SSLContext | None:
    """Return the context for the configured certificate, or None without one."""
    if settings.tls_certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # An empty password makes an encrypted key an error; without it OpenSSL would ask at the terminal and wait.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
        if client_authority is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client_authority)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"The TLS files {settings.tls_certificate} and {settings.tls_key} cannot be used: {error}.",
            advice="Both must be PEM files that this user can read; the key must belong to the certificate and must "
            "not be encrypted.",
            param="tls_certificate",
        ) from error
    return context
