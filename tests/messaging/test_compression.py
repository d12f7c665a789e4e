from __future__ import annotations

from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import ApplianceError, InvalidRequestError, TooLargeError
from appliance.messaging.compression import LARGEST_PLAIN_BYTES, compress, decompress


@given(st.binary(max_size=5000))
def test_what_was_packed_is_unpacked(data: bytes) -> None:
    assert decompress(compress(data)) == data


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = compress(bytes(LARGEST_PLAIN_BYTES + 1))
    assert len(bomb) < 200
    with pytest.raises(TooLargeError, match=r"unpacks to 1048577 bytes; at most 1048576"):
        decompress(bomb)
    assert decompress(compress(bytes(LARGEST_PLAIN_BYTES))) == bytes(LARGEST_PLAIN_BYTES)


def test_a_frame_that_hides_its_length_is_refused() -> None:
    hiding = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000_000))
    with pytest.raises(TooLargeError, match="does not say how much"):
        decompress(hiding)


def test_a_frame_that_lies_about_its_length_is_refused() -> None:
    honest = zstandard.ZstdCompressor().compress(bytes(200_000))
    small = zstandard.ZstdCompressor().compress(bytes(70_000))
    header = zstandard.frame_header_size(honest)
    assert header == zstandard.frame_header_size(small)
    with pytest.raises(InvalidRequestError, match="no sound zstd frame"):
        decompress(small[:header] + honest[header:])


@given(st.binary(max_size=200), st.integers(0, 250), st.integers(1, 255))
def test_damage_is_noticed(data: bytes, place: int, change: int) -> None:
    packed = bytearray(compress(data))
    packed[place % len(packed)] ^= change
    with suppress(ApplianceError):
        assert decompress(bytes(packed)) == data


def test_every_changed_byte_of_a_small_frame_is_noticed() -> None:
    packed = compress(b"telemetry")
    for place in range(len(packed)):
        for change in range(1, 256):
            damaged = bytearray(packed)
            damaged[place] ^= change
            with suppress(ApplianceError):
                assert decompress(bytes(damaged)) == b"telemetry"
    assert decompress(compress(b"")) == b""


def test_what_is_cut_short_or_has_more_behind_it_is_refused() -> None:
    packed = compress(b"telemetry" * 100)
    for wrong in (b"", b"zstd", packed[:-1], packed[:10], packed + b"x", packed + packed):
        with pytest.raises(InvalidRequestError, match="no sound zstd frame"):
            decompress(wrong)
