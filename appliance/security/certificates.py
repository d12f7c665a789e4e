"""X.509 certificates of the fleet: the hub's authority, the broker, the hub, claims and devices.

All keys made here are EC P-256, which every TLS library takes. A certificate says who somebody is, by its common name,
and whether he is a server or a client; what a certificate request wishes beyond its name and its key is ignored.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.core.errors import InvalidRequestError
from appliance.core.fleet import DEVICE_ID

HUB_NAME = "_hub"
CLAIM_NAME = "_claim"
"""Common names of the hub and of claims: no device can have them, for its id begins with a letter or a digit."""

AUTHORITY_S = 20 * 365 * 86_400.0
SERVER_S = 825 * 86_400.0
DEVICE_S = 365 * 86_400.0
CLAIM_S = 90 * 86_400.0

_BACKDATED_S = 86_400.0
"""A certificate begins a day early, so that a box whose clock is behind takes it."""

_DUE_AFTER = 2 / 3
_LARGEST_PEM_BYTES = 16_384

_SERVER = ExtendedKeyUsageOID.SERVER_AUTH
_CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its private key, PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a certificate says.

    Attributes:
        common_name: Whose it is.
        serial: Unique within the authority.
        not_before: Unix seconds.
        not_after: Unix seconds.
        fingerprint: SHA-256 of its DER form, lower-case hex.
    """

    common_name: str
    serial: int
    not_before: float
    not_after: float
    fingerprint: str

    def renewal_due(self, now: float) -> bool:
        """Tell whether two thirds of the lifetime are over."""
        return now >= self.not_before + _DUE_AFTER * (self.not_after - self.not_before)

    def expired(self, now: float) -> bool:
        """Tell whether nobody takes it any more."""
        return now > self.not_after


class Authority:
    """Signs certificates with the key of a CA certificate that signed itself."""

    def __init__(self, identity: Identity) -> None:
        """Take an authority up again.

        Raises:
            InvalidRequestError: The key is none of ours, or does not belong to the certificate.
        """
        self.identity = identity
        self._certificate = _certificate(identity.certificate)
        self._key = _private_key(identity.key)
        if self._key.public_key() != self._certificate.public_key():
            raise InvalidRequestError("The authority's private key does not belong to its certificate.")

    @classmethod
    def create(cls, name: str, now: float, lifetime_s: float = AUTHORITY_S) -> Authority:
        """Make a new authority with a key of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        usage = _key_usage(signs_certificates=True)
        builder = (
            _builder(subject, subject, key.public_key(), now, lifetime_s)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        )
        certificate = builder.sign(key, hashes.SHA256())
        return cls(Identity(certificate.public_bytes(serialization.Encoding.PEM), _pem(key)))

    def server(self, names: Sequence[str], now: float, lifetime_s: float = SERVER_S) -> Identity:
        """Make a key and a server's certificate for these host names and IP addresses."""
        if not names:
            raise InvalidRequestError("A server's certificate needs a host name or an address.")
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = x509.SubjectAlternativeName([_general_name(each) for each in names])
        certificate = self._sign(names[0][:64], key.public_key(), _SERVER, now, lifetime_s, alternatives=alternatives)
        return Identity(certificate, _pem(key))

    def client(self, common_name: str, now: float, lifetime_s: float = DEVICE_S) -> Identity:
        """Make a key and a client's certificate: of the hub or of a claim."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Identity(self._sign(common_name, key.public_key(), _CLIENT, now, lifetime_s), _pem(key))

    def device(self, device: str, request: bytes, now: float, lifetime_s: float = DEVICE_S) -> bytes:
        """Sign a device's request; only its key is taken from it.

        Returns:
            The certificate as PEM, without the authority's.

        Raises:
            InvalidRequestError: The request is damaged, is not signed with its own key, has a weak key, or is for
                another name than `device`.
        """
        if not DEVICE_ID.fullmatch(device):
            raise InvalidRequestError(f"{device!r} cannot be a device's id.")
        return self._sign(device, _requested_key(device, request), _CLIENT, now, lifetime_s)

    def revocations(self, revoked: Mapping[int, float], now: float) -> bytes:
        """Return the list of revoked certificates as PEM, for the broker's `crlfile`.

        It stays valid as long as the authority: a list that ran out would keep every device from connecting.

        Args:
            revoked: Unix seconds of the revocation by serial.
            now: Unix seconds.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(_time(now - _BACKDATED_S))
            .next_update(max(self._certificate.not_valid_after_utc, _time(now + _BACKDATED_S)))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        )
        for serial, at in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_time(at)).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _sign(
        self,
        common_name: str,
        key: _PublicKey,
        purpose: x509.ObjectIdentifier,
        now: float,
        lifetime_s: float,
        *,
        alternatives: x509.SubjectAlternativeName | None = None,
    ) -> bytes:
        builder = (
            _builder(_name(common_name), self._certificate.subject, key, now, lifetime_s)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_request(device: str) -> tuple[bytes, bytes]:
    """Make a device's private key and its certificate request, both PEM; the key never leaves the device."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _pem(key), request_for(device, _pem(key))


def request_for(device: str, key: bytes) -> bytes:
    """Return a certificate request, PEM, for a private key that is there, PEM."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(device))
    return request.sign(_private_key(key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def certificate_facts(certificate: bytes) -> CertificateFacts:
    """Read a certificate, PEM; the first if there is a chain.

    Raises:
        InvalidRequestError: It is none.
    """
    found = _certificate(certificate)
    return CertificateFacts(
        common_name=_common_name(found.subject),
        serial=found.serial_number,
        not_before=found.not_valid_before_utc.timestamp(),
        not_after=found.not_valid_after_utc.timestamp(),
        fingerprint=found.fingerprint(hashes.SHA256()).hex(),
    )


def check_certificate(certificate: bytes, key: bytes, authority: bytes, device: str) -> CertificateFacts:
    """Check a certificate that came from outside before it replaces one that works.

    Raises:
        InvalidRequestError: It is not for this key and this name, or the authority did not sign it.
    """
    found, facts = _certificate(certificate), certificate_facts(certificate)
    if facts.common_name != device:
        raise InvalidRequestError(f"The certificate is for {facts.common_name!r}, not for {device!r}.")
    if found.public_key() != _private_key(key).public_key():
        raise InvalidRequestError("The certificate is not for this private key.")
    try:
        found.verify_directly_issued_by(_certificate(authority))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise InvalidRequestError("The certificate was not signed by this authority.") from error
    return facts


_PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


def _requested_key(device: str, pem: bytes) -> _PublicKey:
    if len(pem) > _LARGEST_PEM_BYTES:
        raise InvalidRequestError(
            f"The certificate request is too large: {len(pem):,} bytes, at most {_LARGEST_PEM_BYTES:,} are taken."
        )
    try:
        request = x509.load_pem_x509_csr(pem)
        signed = request.is_signature_valid
        key = request.public_key()
        name = _common_name(request.subject)
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise InvalidRequestError(f"The certificate request cannot be read: {error}") from error
    if not signed:
        raise InvalidRequestError("The certificate request is not signed with its own key.")
    if name != device:
        raise InvalidRequestError(f"The certificate request is for {name!r}, not for {device!r}.")
    strong_curve = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.key_size >= 256
    strong_rsa = isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 4096
    if not isinstance(key, _PublicKey) or not (strong_curve or strong_rsa or isinstance(key, ed25519.Ed25519PublicKey)):
        raise InvalidRequestError(
            "The certificate request has a key that is not taken.",
            advice="Use EC of 256 bits or more, Ed25519, or RSA of 2048 to 4096 bits.",
        )
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: _PublicKey, now: float, lifetime_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now - _BACKDATED_S))
        .not_valid_after(_time(now + lifetime_s))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    except ValueError as error:
        raise InvalidRequestError(f"{common_name!r} cannot be a certificate's name: {error}") from error


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(found) != 1:
        raise InvalidRequestError(f"One common name is due, and there are {len(found)}.")
    return str(found[0].value)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise InvalidRequestError(f"{name!r} is neither a host name nor an address.") from error


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise InvalidRequestError("The certificate cannot be read: it is no PEM certificate.") from error


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidRequestError("The private key cannot be read: it is no PEM key without a password.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidRequestError("The private key is not of an elliptic curve, as all keys made here are.")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _time(unix_s: float) -> datetime:
    return datetime.fromtimestamp(0, tz=UTC) + timedelta(seconds=int(unix_s))


def requested_key_digest(device: str, request: bytes) -> str:
    """Return the SHA-256 of the public key in a device's certificate request, lower-case hex.

    Raises:
        InvalidRequestError: As for `Authority.device`.
    """
    key = _requested_key(device, request)
    form = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(form).hexdigest()


def revoked_serials(revocations: bytes) -> set[int] | None:
    """Return the serials in a list of revoked certificates, PEM, or None if it is no such list."""
    try:
        return {each.serial_number for each in x509.load_pem_x509_crl(revocations)}
    except ValueError:
        return None
