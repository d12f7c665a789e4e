"""Signed documents: DSSE envelopes (Dead Simple Signing Envelope 1.0) with Ed25519 signatures.

The type of the payload is signed with it, so a document of one kind cannot be passed off as one of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Signature

from appliance.core.errors import UntrustedError
from appliance.security.signing import PublicKey, SigningKey

LARGEST_ENVELOPE_BYTES = 128 * 1024
_MOST_SIGNATURES = 16


class _Signature(Struct, frozen=True):
    keyid: Annotated[str, Meta(max_length=128)]
    sig: Annotated[bytes, Meta(max_length=128)]


class _Envelope(Struct, frozen=True, rename="camel"):
    payload: bytes
    payload_type: Annotated[str, Meta(max_length=200)]
    signatures: Annotated[tuple[_Signature, ...], Meta(max_length=_MOST_SIGNATURES)]


def seal(payload: bytes, payload_type: str, signers: Sequence[SigningKey]) -> bytes:
    """Return an envelope around a payload, signed by each of the keys.

    Args:
        payload: Any bytes.
        payload_type: What they are, such as `JOB_TYPE`.
        signers: At least one.
    """
    envelope = Envelope(payload, payload_type, {})
    signatures = tuple(
        _Signature(each.keyid, bytes.fromhex(each.signature)) for each in (envelope.sign(key.signer) for key in signers)
    )
    return msgspec.json.encode(_Envelope(payload, payload_type, signatures))


def open_envelope(data: bytes, payload_type: str, keys: Sequence[PublicKey], threshold: int = 1) -> bytes:
    """Return the payload of an envelope that enough of the keys have signed.

    Args:
        data: As it came, hostile.
        payload_type: What it has to be.
        keys: Whose signatures count.
        threshold: How many different keys must have signed.

    Raises:
        UntrustedError: It is no envelope, has another type, or too few of the keys have signed it.
    """
    if threshold < 1:
        raise ValueError(f"A threshold of {threshold} would let anything in.")
    envelope = _decoded(data)
    if envelope.payload_type != payload_type:
        raise UntrustedError(
            f"A signed document of the type {envelope.payload_type!r:.100} came where {payload_type!r} is due.",
            code="wrong_document",
        )
    signed = Envelope(envelope.payload, payload_type, {})
    known = {key.id: key.library_key for key in keys}
    count = 0
    for keyid, signature in {each.keyid: each.sig for each in envelope.signatures}.items():
        if keyid not in known:
            continue
        try:
            known[keyid].verify_signature(Signature(keyid, signature.hex()), signed.pae())
        except UnverifiedSignatureError:
            continue
        count += 1
    if count < threshold:
        raise UntrustedError(
            f"{threshold} valid signature(s) of {len(known)} known key(s) are needed, and the document has {count}.",
            advice="If the signing keys were changed, their new list has to be fetched first.",
            code="bad_signature",
        )
    return envelope.payload


def _decoded(data: bytes) -> _Envelope:
    if len(data) > LARGEST_ENVELOPE_BYTES:
        raise UntrustedError(
            f"A signed document has {len(data):,} bytes; {LARGEST_ENVELOPE_BYTES:,} are allowed.", code="wrong_document"
        )
    try:
        return msgspec.json.decode(data, type=_Envelope)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UntrustedError(f"This is no signed document: {error}.", code="wrong_document") from error
