"""Pieces and blocks: their arithmetic covers each byte once, and a piece is right or refused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import InvalidRequestError
from appliance.core.fleet import BLOCK_BYTES, PIECE_BYTES
from appliance.fleet.pieces import PieceList, from_bitmap, to_bitmap
from tests.fleet.updating import piece_list


def blank(length: int) -> PieceList:
    return PieceList("0" * 64, length, bytes(32 * -(-length // PIECE_BYTES)))


@given(st.integers(1, 40 * PIECE_BYTES))
def test_pieces_and_blocks_cover_every_byte_once(length: int) -> None:
    pieces = blank(length)
    assert sum(pieces.piece_size(each) for each in range(pieces.count)) == length
    assert sum(pieces.block_size(each) for each in range(pieces.block_count)) == length
    blocks = [block for piece in range(pieces.count) for block in pieces.blocks(piece)]
    assert blocks == list(range(pieces.block_count))
    assert all(
        sum(pieces.block_size(block) for block in pieces.blocks(piece)) == pieces.piece_size(piece)
        for piece in range(pieces.count)
    )


@pytest.mark.parametrize(
    ("length", "hashes"), [(0, b""), (-1, b""), (1, b""), (1, bytes(64)), (PIECE_BYTES, bytes(31))]
)
def test_a_list_of_another_length_than_the_file_is_refused(length: int, hashes: bytes) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        PieceList("0" * 64, length, hashes)
    assert refusal.value.code == "bad_piece_list"


def test_only_the_very_bytes_of_a_piece_are_accepted() -> None:
    content = bytes(range(256)) * 8192  # two pieces
    pieces = piece_list(content)
    assert pieces.digest == hashlib.sha256(content).hexdigest()
    assert pieces.accepts(0, content[:PIECE_BYTES])
    assert not pieces.accepts(0, content[: PIECE_BYTES - 1])
    flipped = bytes([content[0] ^ 1]) + content[1:PIECE_BYTES]
    assert not pieces.accepts(0, flipped)
    assert pieces.places() == {pieces.hash_of(0): [0, 1]}
    assert pieces.block_size(0) == BLOCK_BYTES


@given(st.sets(st.integers(0, 99)), st.integers(0, 100))
def test_a_bitmap_keeps_what_is_below_its_count(numbers: set[int], count: int) -> None:
    kept = {each for each in numbers if each < count}
    assert from_bitmap(to_bitmap(kept, count), count) == kept
    assert from_bitmap(to_bitmap(kept, count)[:-1], count) <= kept
