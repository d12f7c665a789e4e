"""The hub's certificate authority at work: checks boxes' requests, and signs them."""

from __future__ import annotations

from appliance.core.errors import InvalidRequestError
from appliance.hub.enrolment_records import Signed
from appliance.security.certificates import Authority, certificate_facts, requested_key_digest

DAY_S = 86_400.0


class HubAuthority:
    """Signs devices' certificates."""

    def __init__(self, authority: Authority) -> None:
        """Sign with an authority."""
        self.authority = authority

    def check_request(self, request: str, device: str) -> str:
        """Return the SHA-256 of the public key of a certificate request for exactly this device.

        Raises:
            InvalidRequestError: It is malformed, not signed with its own key, or for somebody else.
        """
        return requested_key_digest(device, _ascii(request))

    def sign(self, request: str, device: str, *, days: int, now: float) -> Signed:
        """Sign a request; nothing of it but the public key gets into the certificate.

        Raises:
            InvalidRequestError: As `check_request`.
        """
        certificate = self.authority.device(device, _ascii(request), now, days * DAY_S)
        facts = certificate_facts(certificate)
        return Signed(f"{facts.serial:x}", certificate.decode(), facts.not_after)


def _ascii(request: str) -> bytes:
    try:
        return request.encode("ascii")
    except UnicodeEncodeError as error:
        raise InvalidRequestError("The certificate request is no PEM: it has other than ASCII characters.") from error
