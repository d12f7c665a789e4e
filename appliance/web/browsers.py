"""Keeps web pages away from a server that asks for no API key.

A page from anywhere, open in a browser on this machine, can send requests to 127.0.0.1. Two marks give it away: an
`Origin` that is not ours (a cross-site request), and a `Host` that is a foreign name which the page's owner made
resolve to 127.0.0.1 (DNS rebinding). With API keys neither matters, since the page knows none. CORS headers are
never sent.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.core.errors import InvalidRequestError, PermissionDeniedError
from appliance.web.auth import Authenticator
from appliance.web.exposure import is_loopback
from appliance.web.server_settings import ServerSettings

_ADVICE = "Web pages may not use a server without API keys: set require_api_key and send a key, or call from a program."


class BrowserGuard:
    """ASGI middleware that refuses requests made by foreign web pages."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, authenticator: Authenticator) -> None:
        self._app = app
        self._check_host = is_loopback(settings.host)
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if not self._authenticator.required:
            refuse_foreign_page(Headers(scope=scope), check_host=self._check_host)
        await self._app(scope, receive, send)


def refuse_foreign_page(headers: Headers, *, check_host: bool) -> None:
    """Check the two headers that a browser sets and a page cannot.

    Args:
        headers: Of the request.
        check_host: Whether the server is on loopback, where only loopback names and IP addresses are believed.

    Raises:
        InvalidRequestError: More than one `Host`.
        PermissionDeniedError: The request comes from a foreign page.
    """
    hosts = headers.getlist("host")
    if len(hosts) > 1:
        raise InvalidRequestError("The request has more than one Host header.", code="bad_http")
    host = hosts[0] if hosts else ""
    if check_host and host and not _is_local(_hostname(f"//{host}")):
        raise PermissionDeniedError(
            f"The Host header {host[:200]!r} does not name this machine's loopback.",
            advice=_ADVICE,
            code="foreign_page",
        )
    for origin in headers.getlist("origin"):
        if _netloc(origin) != host.lower() or not host:
            raise PermissionDeniedError(
                f"The request comes from a web page of {origin[:200]!r}.", advice=_ADVICE, code="foreign_page"
            )


@lru_cache(maxsize=64)  # nearly every request has the same
def _is_local(hostname: str) -> bool:
    if hostname == "localhost" or hostname.endswith(".localhost"):  # RFC 6761 section 6.3: never resolved elsewhere
        return True
    try:
        ip_address(hostname)
    except ValueError:
        return False
    return True  # an address cannot be rebound, so it is the one that the user typed


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
