"""Compressed request bodies. Pure; may run in a thread."""

from __future__ import annotations

import zlib

from appliance.core.errors import InvalidRequestError, TooLargeError

ENCODINGS = frozenset({"gzip", "deflate"})
"""What `Content-Encoding` may say; `deflate` means the zlib format (RFC 9110 section 8.4.1.2)."""

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


def decompressed(body: memoryview, limit: int) -> memoryview:
    """Return a body as it was before it was compressed.

    Args:
        body: In the gzip or zlib format.
        limit: Most bytes that it may have decompressed; it is never expanded beyond.

    Raises:
        InvalidRequestError: It is not in that format, ends early or has something behind its end.
        TooLargeError: It is larger.
    """
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        data = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise _bad(f"cannot be decompressed: {error}") from error
    if len(data) > limit:
        raise TooLargeError(
            f"The request body has more than {limit} bytes when it is decompressed; {limit} are allowed.",
            advice="Send less, or raise max_tensor_body_bytes.",
        )
    if not stream.eof:
        raise _bad("ends before its compressed data does")
    if stream.unused_data:
        raise _bad("has something behind the end of its compressed data")
    return memoryview(data)


def _bad(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"The request body {problem}.", code="invalid_value")
