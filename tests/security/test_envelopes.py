"""DSSE envelopes: what is signed comes out as it went in, and nothing else comes out at all."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import UntrustedError
from appliance.security.envelopes import LARGEST_ENVELOPE_BYTES, open_envelope, seal
from appliance.security.signing import PublicKey, make_key

TYPE = "application/vnd.appliance.job+json"
ALICE, BOB, EVE = make_key(), make_key(), make_key()
KEYS = (ALICE.public, BOB.public)


def document(data: bytes) -> dict[str, Any]:
    return dict(json.loads(data))


@given(st.binary(max_size=2000))
def test_what_was_sealed_is_opened(payload: bytes) -> None:
    assert open_envelope(seal(payload, TYPE, [ALICE]), TYPE, KEYS) == payload


def test_the_envelope_is_as_the_dsse_protocol_has_it() -> None:
    """The example of the protocol's own test vectors, but for the key: the signed bytes are the PAE."""
    sealed = document(seal(b"hello world", "http://example.com/HelloWorld", [ALICE]))
    assert base64.b64decode(sealed["payload"]) == b"hello world"
    assert sealed["payloadType"] == "http://example.com/HelloWorld"
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    Ed25519PublicKey.from_public_bytes(bytes.fromhex(ALICE.public.value)).verify(
        base64.b64decode(sealed["signatures"][0]["sig"]), b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_threshold_is_met_by_different_keys() -> None:
    assert open_envelope(seal(b"x", TYPE, [ALICE, BOB]), TYPE, KEYS, 2) == b"x"


def test_one_signature_is_below_a_threshold_of_two() -> None:
    with pytest.raises(UntrustedError, match="2 valid signature") as refusal:
        open_envelope(seal(b"x", TYPE, [ALICE, EVE]), TYPE, KEYS, 2)
    assert refusal.value.code == "bad_signature"


def test_the_same_key_twice_counts_once() -> None:
    sealed = document(seal(b"x", TYPE, [ALICE]))
    sealed["signatures"] *= 2
    with pytest.raises(UntrustedError, match="has 1"):
        open_envelope(json.dumps(sealed).encode(), TYPE, (ALICE.public, ALICE.public), 2)


def test_a_key_under_anothers_name_counts_for_nobody() -> None:
    sealed = document(seal(b"x", TYPE, [EVE]))
    sealed["signatures"][0]["keyid"] = ALICE.id
    with pytest.raises(UntrustedError, match="has 0"):
        open_envelope(json.dumps(sealed).encode(), TYPE, KEYS)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(UntrustedError):
        open_envelope(seal(b"x", TYPE, [EVE]), TYPE, KEYS)


def test_another_type_is_refused_even_when_it_is_written_over() -> None:
    sealed = seal(b"x", "application/other", [ALICE])
    with pytest.raises(UntrustedError) as refusal:
        open_envelope(sealed, TYPE, KEYS)
    assert refusal.value.code == "wrong_document"
    with pytest.raises(UntrustedError) as refusal:
        open_envelope(sealed.replace(b"application/other", TYPE.encode()), TYPE, KEYS)
    assert refusal.value.code == "bad_signature"


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_changes_what_comes_out(place: int, change: int) -> None:
    data = bytearray(seal(b"payload", TYPE, [ALICE]))
    data[place % len(data)] ^= change
    with suppress(UntrustedError):
        assert open_envelope(bytes(data), TYPE, KEYS) == b"payload"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"payload":"*","payloadType":"x","signatures":[]}',
        b'{"payload":1}',
        b" " * (LARGEST_ENVELOPE_BYTES + 1),
    ],
    ids=["nothing", "empty", "deep", "no text", "no base64", "wrong fields", "huge"],
)
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(UntrustedError):
        open_envelope(garbage, TYPE, KEYS)


def test_no_threshold_at_all_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="threshold"):
        open_envelope(seal(b"x", TYPE, []), TYPE, KEYS, 0)


@pytest.mark.parametrize("value", ["", "ab", "g" * 64, "A" * 64, "0" * 65])
def test_what_is_no_public_key_is_refused(value: str) -> None:
    with pytest.raises(UntrustedError):
        PublicKey(value)
