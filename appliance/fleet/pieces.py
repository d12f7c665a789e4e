"""Pieces and blocks of a model file: their arithmetic, and the signed list that each piece is held against.

A file is made of pieces of 1 MiB, which have a SHA-256 each, and a piece of blocks of 64 KiB, which are what one
message carries. The last of either may be shorter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from appliance.core.errors import InvalidRequestError
from appliance.core.fleet import BLOCK_BYTES, PIECE_BYTES

BLOCKS_A_PIECE = PIECE_BYTES // BLOCK_BYTES
HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class PieceList:
    """The pieces of one file.

    Attributes:
        digest: SHA-256 of the whole file, lower-case hex.
        length: Bytes of the whole file.
        hashes: SHA-256 of each piece, one behind the other.
    """

    digest: str
    length: int
    hashes: bytes

    def __post_init__(self) -> None:
        due = HASH_BYTES * self.count
        if self.length <= 0 or len(self.hashes) != due:
            raise InvalidRequestError(
                f"The piece list of {self.digest:.64} has {len(self.hashes):,} bytes; a file of {self.length:,} bytes "
                f"has one of {due:,}.",
                advice="The release was made wrongly: add it again at the hub.",
                code="bad_piece_list",
            )

    @property
    def count(self) -> int:
        """Return how many pieces there are."""
        return -(-self.length // PIECE_BYTES)

    @property
    def block_count(self) -> int:
        """Return how many blocks there are."""
        return -(-self.length // BLOCK_BYTES)

    def piece_size(self, piece: int) -> int:
        """Return the bytes of a piece."""
        return min(PIECE_BYTES, self.length - piece * PIECE_BYTES)

    def block_size(self, block: int) -> int:
        """Return the bytes of a block."""
        return min(BLOCK_BYTES, self.length - block * BLOCK_BYTES)

    def blocks(self, piece: int) -> range:
        """Return the indexes of a piece's blocks."""
        first = piece * BLOCKS_A_PIECE
        return range(first, min(first + BLOCKS_A_PIECE, self.block_count))

    def hash_of(self, piece: int) -> bytes:
        """Return the SHA-256 that a piece must have."""
        return self.hashes[piece * HASH_BYTES : (piece + 1) * HASH_BYTES]

    def accepts(self, piece: int, data: bytes) -> bool:
        """Tell whether these are the bytes of the piece."""
        return len(data) == self.piece_size(piece) and hashlib.sha256(data).digest() == self.hash_of(piece)

    def places(self) -> dict[bytes, list[int]]:
        """Return by hash which pieces have it."""
        found: dict[bytes, list[int]] = {}
        for piece in range(self.count):
            found.setdefault(self.hash_of(piece), []).append(piece)
        return found


def hashes_of(content: Iterable[bytes]) -> bytes:
    """Return the piece list of a file that comes in chunks of `PIECE_BYTES`."""
    return b"".join(hashlib.sha256(each).digest() for each in content)


def to_bitmap(numbers: Iterable[int], count: int) -> bytes:
    """Return a bitmap of `count` bits, the lowest of byte 0 first."""
    bits = bytearray(-(-count // 8))
    for number in numbers:
        bits[number // 8] |= 1 << number % 8
    return bytes(bits)


def from_bitmap(bitmap: bytes, count: int) -> set[int]:
    """Return the numbers below `count` whose bits are set; what a torn bitmap lacks is not set."""
    return {number for number in range(min(count, 8 * len(bitmap))) if bitmap[number // 8] >> number % 8 & 1}
