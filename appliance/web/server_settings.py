"""The settings that a listening server needs, whichever program it is in."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class ServerSettings(Protocol):
    """Of `Settings` and of `HubSettings`; what each means is said there."""

    @property
    def host(self) -> str:
        """Return the address to listen on."""
        ...

    @property
    def port(self) -> int:
        """Return the TCP port; 0 picks a free one."""
        ...

    @property
    def tls_certificate(self) -> Path | None:
        """Return the PEM file with the certificate chain, or None."""
        ...

    @property
    def tls_key(self) -> Path | None:
        """Return the PEM file with the private key, or None."""
        ...

    @property
    def insecure(self) -> bool:
        """Return whether strangers may be let in."""
        ...

    @property
    def require_api_key(self) -> bool:
        """Return whether a key is asked for on loopback too."""
        ...

    @property
    def max_connections(self) -> int:
        """Return the most open connections."""
        ...

    @property
    def max_header_bytes(self) -> int:
        """Return the largest request head."""
        ...

    @property
    def header_timeout_s(self) -> float:
        """Return the longest time to send a request head."""
        ...

    @property
    def body_timeout_s(self) -> float:
        """Return the longest time to send a request body."""
        ...

    @property
    def write_timeout_s(self) -> float:
        """Return the longest time to take in what is written."""
        ...

    @property
    def keep_alive_timeout_s(self) -> float:
        """Return the idle time after which a connection is closed."""
        ...
