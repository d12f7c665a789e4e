"""API keys at the door: `Authorization: Bearer …`, and the scope that a route asks for."""

from __future__ import annotations

from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import Scope

from appliance.core.errors import AuthenticationError, PermissionDeniedError
from appliance.security.keys import ApiKey
from appliance.web.exposure import MAKE_KEY, is_loopback, keys_required
from appliance.web.server_settings import ServerSettings


class Keys(Protocol):
    """What the door asks of the key store; both calls answer in microseconds."""

    def authenticate(self, token: str) -> ApiKey | None:
        """Return the valid key with this secret, or None."""
        ...

    def has_keys(self) -> bool:
        """Tell whether any key is valid."""
        ...


class Authenticator:
    """Decides who may do what.

    Once keys have been needed they stay needed for the life of the process: revoking the last key of a box that
    listens to others must not open it.
    """

    def __init__(self, settings: ServerSettings, keys: Keys, *, make_key: str = MAKE_KEY) -> None:
        """Ask for keys as the settings say; `make_key` is the command that makes one."""
        self._settings = settings
        self._make_key = make_key
        self._keys = keys
        self._required = False

    @property
    def required(self) -> bool:
        """Whether requests need an API key now."""
        if not self._required:
            # On loopback the existence of keys changes nothing, so the database is left alone.
            has_keys = not is_loopback(self._settings.host) and self._keys.has_keys()
            self._required = keys_required(self._settings, has_keys=has_keys)
        return self._required

    def authorize(self, scope: Scope, needed: str) -> None:
        """Let a request pass or refuse it; a valid key becomes the request's tenant, and its weight the request's.

        On an open server an unknown token is passed over, since clients send one whether it is needed or not. There
        every service tier is allowed too, since whoever leaves his key out could not be held to its tier.

        Raises:
            AuthenticationError: A key is needed and none, or one that is not valid, was sent.
            PermissionDeniedError: The key lacks the scope.
        """
        token = bearer_token(Headers(scope=scope))
        key = self._keys.authenticate(token) if token else None
        if key is not None:
            scope["state"]["tenant"] = key.id
            scope["state"]["weight"] = key.weight
        if not self.required:
            return
        if key is None:
            raise AuthenticationError(
                "The API key is not valid." if token else "This server needs an API key.",
                advice=f"Send `Authorization: Bearer <key>`; `{self._make_key}` makes one.",
            )
        if not key.allows(needed):
            raise PermissionDeniedError(
                f"The API key {key.name!r} lacks the scope {needed!r}; it has {', '.join(sorted(key.scopes))}.",
                advice=f"Use a key made with `{self._make_key} --scope {needed}`.",
            )
        scope["state"]["highest_tier"] = key.highest_tier


def bearer_token(headers: Headers) -> str:
    """Return the token of the one `Authorization: Bearer` header (RFC 6750), or "" when there is none."""
    values = headers.getlist("authorization")
    if len(values) != 1:
        return ""
    scheme, _, token = values[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
