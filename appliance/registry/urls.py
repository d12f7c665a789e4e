"""Which addresses a file may be fetched from, and how an address is shown."""

from __future__ import annotations

import ipaddress

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from appliance.core.errors import InvalidRequestError


def check_url(text: str) -> Url:
    """Return the parts of an https address, or of an http one on loopback.

    Raises:
        InvalidRequestError: It is another address, or none.
    """
    try:
        url = parse_url(text)
    except LocationParseError as error:
        raise InvalidRequestError(f"{text!r:.200} is not an address.") from error
    if not url.host or not (url.scheme == "https" or (url.scheme == "http" and is_loopback(url.host))):
        raise InvalidRequestError(
            f"{shown(url)!r:.200} is not an https address.",
            advice="Models are fetched over https; plain http is for this machine (127.0.0.1) only.",
        )
    return url


def is_loopback(host: str) -> bool:
    """Tell whether a host, as it stands in an address, is this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def shown(url: Url) -> str:
    """Return the address without its credentials and query, which may be secret."""
    return url._replace(auth=None, query=None, fragment=None).url
