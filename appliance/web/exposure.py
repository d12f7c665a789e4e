"""Who may reach the server: the policy of addresses, API keys and TLS, without any I/O."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address

from appliance.core.errors import SettingsError
from appliance.web.server_settings import ServerSettings

MAKE_KEY = "appliance keys create"
"""The command that makes an API key of the box."""


@lru_cache(maxsize=16)  # each request asks it of the address that is listened on
def is_loopback(host: str) -> bool:
    """Tell whether only programs of this machine can connect to an address.

    A name other than `localhost` counts as reachable from outside: what it resolves to may change.
    """
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(settings: ServerSettings, has_keys: bool, make_key: str = MAKE_KEY) -> None:
    """Refuse to listen in a way that lets strangers in; to be called before listening.

    Args:
        settings: The effective settings.
        has_keys: Whether there is an API key that can still be used.
        make_key: The command that makes one.

    Raises:
        SettingsError: The address is not loopback and API keys or TLS are missing without `insecure`, or only one
            of the two TLS files is set.
    """
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        missing = "tls_certificate" if settings.tls_certificate is None else "tls_key"
        raise SettingsError(
            f"TLS needs a certificate and its private key, but {missing} is not set.",
            advice="Set both tls_certificate and tls_key, or neither.",
            param=missing,
        )
    if is_loopback(settings.host) or settings.insecure:
        return
    missing_parts, advice = [], []
    if not has_keys:
        missing_parts.append("an API key")
        advice.append(f"create a key with `{make_key}`")
    if settings.tls_certificate is None:
        missing_parts.append("TLS")
        advice.append("set tls_certificate and tls_key")
    if missing_parts:
        raise SettingsError(
            f"Listening on {settings.host} would let other machines in without {' and '.join(missing_parts)}.",
            advice=f"Please {' and '.join(advice)}; or listen on 127.0.0.1; or set insecure at your own risk.",
            param="host",
        )


def keys_required(settings: ServerSettings, *, has_keys: bool) -> bool:
    """Tell whether requests need an API key.

    Loopback is open unless `require_api_key` is set. Any other address needs keys; with `insecure` it is open for
    as long as no key exists, so creating one closes it.
    """
    if settings.require_api_key:
        return True
    if is_loopback(settings.host):
        return False
    return has_keys or not settings.insecure
