"""zstd for batches of telemetry: nothing that a device sends can make the hub unpack more than it was told to.

A frame must say how much it unpacks to, which is looked at before anything is unpacked, and ends with a checksum.
Format: RFC 8878.
"""

from __future__ import annotations

import zstandard

from appliance.core.errors import InvalidRequestError, TooLargeError
from appliance.core.fleet import LARGEST_BATCH_BYTES

LARGEST_PLAIN_BYTES = 16 * LARGEST_BATCH_BYTES
"""What a batch may unpack to."""

_LEVEL = 3


def compress(data: bytes) -> bytes:
    """Return the data as one zstd frame that states its length and ends with a checksum."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True).compress(data)


_NOTHING = compress(b"")


def decompress(data: bytes, *, most: int = LARGEST_PLAIN_BYTES) -> bytes:
    """Return what a frame holds.

    Args:
        data: One frame and nothing behind it; hostile.
        most: Bytes that it may unpack to.

    Raises:
        TooLargeError: It says that it unpacks to more, or does not say to how much; nothing was unpacked.
        InvalidRequestError: It is no zstd frame, is cut short or damaged, or there is more behind it.
    """
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if stated > most:
            raise TooLargeError(
                f"A zstd frame of {len(data)} bytes unpacks to {_stated(stated)}; at most {most} bytes are taken."
            )
        if stated == 0 and data != _NOTHING:  # zstandard would return nothing without looking at the rest
            raise InvalidRequestError(f"{len(data)} bytes are no sound zstd frame: it states that it is empty.")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=most, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InvalidRequestError(f"{len(data)} bytes are no sound zstd frame: {error}.") from error


def _stated(size: int) -> str:
    return "it does not say how much" if size == zstandard.CONTENTSIZE_UNKNOWN else f"{size} bytes"
