"""The hub's certificate authority at work: loads its key, checks boxes' requests, signs, and lists who is revoked."""

from __future__ import annotations

from pathlib import Path

from appliance.core.errors import InvalidRequestError, NotFoundError
from appliance.hub.enrolment_records import Signed
from appliance.security.certificates import Authority, Identity, certificate_facts, requested_key_digest
from appliance.store.private_files import read_file

DAY_S = 86_400.0


class HubAuthority:
    """Signs devices' certificates."""

    def __init__(self, authority: Authority) -> None:
        """Sign with an authority."""
        self.authority = authority

    @classmethod
    def load(cls, certificate: Path, key: Path) -> HubAuthority:
        """Load the authority from its files.

        Raises:
            NotFoundError: There is none.
            InvalidRequestError: The files do not hold a key and the certificate that goes with it.
        """
        contents = [read_file(path) for path in (certificate, key)]
        if contents[0] is None or contents[1] is None:
            raise NotFoundError(
                f"There is no certificate authority in {certificate.parent}.",
                advice="Make the hub with: appliance hub init --data FOLDER --name HOST",
            )
        return cls(Authority(Identity(contents[0], contents[1])))

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
