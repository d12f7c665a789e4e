"""Certificates of simulated devices: one private key for all of them, which only a simulation may do."""

from __future__ import annotations

import functools
import ssl
from dataclasses import dataclass
from pathlib import Path

from appliance.messaging.options import TlsFiles
from appliance.security.certificates import Authority, new_request, request_for

LIFETIME_S = 7 * 86_400.0


class SimulatedIdentities:
    """Signs a certificate for each device, in one folder that goes with the simulation.

    What is made is kept, so that only the first connecting of a device costs this machine what each costs a box. The
    files are written without waiting for the disk: they are worth nothing once the simulation is over.
    """

    def __init__(self, folder: Path, authority: Authority, now: float) -> None:
        """Sign nothing yet."""
        self._folder = folder
        self._authority = authority
        self._now = now
        self._key, _ = new_request("simulated")
        self._trusted = folder / "authority.pem"
        self._trusted.write_bytes(authority.identity.certificate)
        self._key_path = folder / "key.pem"
        self._key_path.touch(mode=0o600)
        self._key_path.write_bytes(self._key)
        self._made: dict[str, _Prepared] = {}

    def tls(self, device: str) -> TlsFiles:
        """Return a device's identity."""
        made = self._made.get(device)
        if made is None:
            certificate = self._folder / f"{device}.pem"
            request = request_for(device, self._key)
            certificate.write_bytes(self._authority.device(device, request, self._now, LIFETIME_S))
            made = self._made[device] = _Prepared(self._trusted, certificate, self._key_path)
        return made


@dataclass(frozen=True)
class _Prepared(TlsFiles):
    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        return super().context()

    def context(self) -> ssl.SSLContext:
        return self._context
