"""Certificates: what a device may wish, what it gets, and when it has to come again."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.core.errors import InvalidRequestError, StorageError
from appliance.security.certificates import (
    DEVICE_S,
    Authority,
    Identity,
    certificate_facts,
    check_certificate,
    new_request,
    request_for,
)
from appliance.store.files import write_durably

NOW = 1_800_000_000.0
DAY_S = 86_400.0


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("Test fleet", NOW)


def request(name: str, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_device_gets_a_certificate_for_its_own_key_and_name(authority: Authority) -> None:
    key, asked = new_request("box-1")
    certificate = authority.device("box-1", asked, NOW)
    facts = check_certificate(certificate, key, authority.identity.certificate, "box-1")
    assert (facts.common_name, facts.not_after) == ("box-1", NOW + DEVICE_S)
    assert facts.not_before < NOW
    assert certificate_facts(authority.device("box-1", request_for("box-1", key), NOW)).serial != facts.serial


def test_what_a_request_wishes_beyond_its_key_is_ignored(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    asked = request(
        "box-1",
        key,
        x509.BasicConstraints(ca=True, path_length=3),
        x509.SubjectAlternativeName([x509.DNSName("hub.example")]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
    )
    found = x509.load_pem_x509_certificate(authority.device("box-1", asked, NOW))
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert found.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    with pytest.raises(x509.ExtensionNotFound):
        found.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_a_request_for_another_name_is_refused(authority: Authority) -> None:
    _, asked = new_request("box-2")
    with pytest.raises(InvalidRequestError, match="box-2"):
        authority.device("box-1", asked, NOW)


@pytest.mark.parametrize("name", ["_hub", "_claim", "Box", "a/b", "+", "#", "", "b" * 64])
def test_a_name_that_is_no_device_id_is_refused(authority: Authority, name: str) -> None:
    _, asked = new_request("box-1")
    with pytest.raises(InvalidRequestError, match="id"):
        authority.device(name, asked, NOW)


def test_a_request_that_its_own_key_did_not_sign_is_refused(authority: Authority) -> None:
    asked = x509.load_pem_x509_csr(new_request("box-1")[1]).public_bytes(serialization.Encoding.DER)
    forged = bytearray(asked)
    forged[-3] ^= 1
    try:
        pem = x509.load_der_x509_csr(bytes(forged)).public_bytes(serialization.Encoding.PEM)
    except ValueError:
        pytest.fail("the test must break the signature, not the structure")
    with pytest.raises(InvalidRequestError):
        authority.device("box-1", pem, NOW)


@pytest.mark.parametrize("pem", [b"", b"no PEM", b"x" * 20_000, b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_a_damaged_request_is_refused(authority: Authority, pem: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="request"):
        authority.device("box-1", pem, NOW)


def test_weak_keys_are_refused_and_strong_ones_of_other_kinds_taken(authority: Authority) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "box-1")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)

    def pem(signed: x509.CertificateSigningRequest) -> bytes:
        return signed.public_bytes(serialization.Encoding.PEM)

    weak = [
        pem(builder.sign(rsa.generate_private_key(65_537, 1024), hashes.SHA256())),
        pem(builder.sign(ec.generate_private_key(ec.SECP192R1()), hashes.SHA256())),
        pem(builder.sign(dsa.generate_private_key(2048), hashes.SHA256())),
    ]
    for asked in weak:
        with pytest.raises(InvalidRequestError, match="key"):
            authority.device("box-1", asked, NOW)
    strong = [
        pem(builder.sign(rsa.generate_private_key(65_537, 2048), hashes.SHA256())),
        pem(builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())),
        pem(builder.sign(ed25519.Ed25519PrivateKey.generate(), None)),
    ]
    for asked in strong:
        assert certificate_facts(authority.device("box-1", asked, NOW)).common_name == "box-1"


def test_two_common_names_are_refused(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.NameAttribute(NameOID.COMMON_NAME, each) for each in ("box-1", "box-2")]
    asked = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names)).sign(key, hashes.SHA256())
    with pytest.raises(InvalidRequestError, match="common name"):
        authority.device("box-1", asked.public_bytes(serialization.Encoding.PEM), NOW)


def test_renewal_is_due_after_two_thirds_of_the_lifetime(authority: Authority) -> None:
    facts = certificate_facts(authority.client("_hub", NOW, 90 * DAY_S).certificate)
    due = facts.not_before + (facts.not_after - facts.not_before) * 2 / 3
    assert not facts.renewal_due(due - 1)
    assert facts.renewal_due(due)
    assert not facts.expired(facts.not_after)
    assert facts.expired(facts.not_after + 1)


def test_a_certificate_that_does_not_fit_is_not_taken(authority: Authority) -> None:
    key, asked = new_request("box-1")
    other_key, other = new_request("box-1")
    certificate = authority.device("box-1", asked, NOW)
    ours = authority.identity.certificate
    stranger = Authority.create("Test fleet", NOW)
    for wrong in (
        (certificate, key, ours, "box-2"),
        (certificate, other_key, ours, "box-1"),
        (stranger.device("box-1", asked, NOW), key, ours, "box-1"),
        (authority.device("box-1", other, NOW), key, ours, "box-1"),
        (b"nonsense", key, ours, "box-1"),
        (certificate, b"nonsense", ours, "box-1"),
    ):
        with pytest.raises(InvalidRequestError):
            check_certificate(*wrong)


def test_an_authority_is_taken_up_again_only_with_its_own_key(authority: Authority) -> None:
    again = Authority(authority.identity)
    assert certificate_facts(again.client("_hub", NOW).certificate).common_name == "_hub"
    stranger = Authority.create("Test fleet", NOW)
    with pytest.raises(InvalidRequestError, match="does not belong"):
        Authority(Identity(authority.identity.certificate, stranger.identity.key))


def test_the_list_of_the_revoked_is_valid_as_long_as_the_authority(authority: Authority) -> None:
    found = x509.load_pem_x509_crl(authority.revocations({7: NOW, 5: NOW - DAY_S}, NOW))
    assert [each.serial_number for each in found] == [5, 7]
    assert found.next_update_utc is not None
    assert found.next_update_utc.timestamp() == certificate_facts(authority.identity.certificate).not_after
    signer = x509.load_pem_x509_certificate(authority.identity.certificate).public_key()
    assert isinstance(signer, ec.EllipticCurvePublicKey)
    assert found.is_signature_valid(signer)


def test_a_server_has_names_and_addresses_and_no_nonsense(authority: Authority) -> None:
    found = x509.load_pem_x509_certificate(authority.server(["hub.example", "10.0.0.1", "::1"], NOW).certificate)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    for wrong in ([], ["hüb.example"]):
        with pytest.raises(InvalidRequestError):
            authority.server(wrong, NOW)


def test_a_private_key_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    key, public = tmp_path / "a.key", tmp_path / "a.crt"
    key.write_bytes(b"old")
    key.chmod(0o644)
    write_durably(key, b"secret", mode=0o600)
    write_durably(public, b"known")
    assert (key.read_bytes(), stat.S_IMODE(key.stat().st_mode)) == (b"secret", 0o600)
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.crt", "a.key"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="taken"):
        write_durably(tmp_path / "taken", b"x")
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(StorageError, match="missing"):
        write_durably(tmp_path / "missing" / "file", b"x")
