"""A run of bytes out of a file behind an https address, for those who know the hash of each part of it.

Protocol: range requests of RFC 9110, section 14. A server that sends less than `LEAST_BYTES_PER_S` for long is given
up, however regularly it drips, and what it announces must agree with what is wanted.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError

from appliance.core.errors import SourceError
from appliance.registry.sources.https import CHUNK_BYTES, get, name_of

LEAST_BYTES_PER_S = 16 * 1024

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


@dataclass(slots=True)
class RangeBody:
    """What is being sent, read from its beginning on."""

    address: str
    response: BaseHTTPResponse
    stall_timeout_s: float

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes.

        Raises:
            SourceError: The server broke off, fell silent or is too slow.
        """
        deadline = time.monotonic() + self.stall_timeout_s + size / LEAST_BYTES_PER_S
        parts: list[bytes] = []
        missing = size
        with _source_errors(self.address):
            while missing:
                part = self.response.read1(min(missing, CHUNK_BYTES))
                if not part:
                    raise SourceError(f"{name_of(self.address)} broke off with {missing:,} bytes to come.")
                if time.monotonic() > deadline:
                    raise SourceError(
                        f"{name_of(self.address)} is slower than {LEAST_BYTES_PER_S:,} bytes a second.",
                        advice="Use another mirror.",
                        code="source_slow",
                    )
                parts.append(part)
                missing -= len(part)
        return b"".join(parts)


@contextmanager
def open_range(
    address: str, first: int, end: int, total: int, *, stall_timeout_s: float, context: ssl.SSLContext | None = None
) -> Iterator[RangeBody]:
    """Ask for the bytes from `first` to before `end` of a file of `total` bytes; `context` as for `https.get`.

    Raises:
        SourceError: The server cannot be reached, has no such file, or another one.
        InvalidRequestError: The address is not one we fetch from.
    """
    wanted = {"Range": f"bytes={first}-{end - 1}"}
    with _source_errors(address), get(address, wanted, stall_timeout_s, context) as response:
        if response.status == 404:
            raise SourceError(f"{name_of(address)} does not exist.", code="gone")
        whole = response.status == 200 and first == 0 and end == total
        if response.status != 206 and not whole:
            raise SourceError(f"{name_of(address)} answered a range request with the HTTP status {response.status}.")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise SourceError(f"{name_of(address)} sends the file compressed, which was not asked for.")
        if not whole:
            _check_range(address, response.headers.get("Content-Range", ""), first, end, total)
        yield RangeBody(address, response, stall_timeout_s)


def _check_range(address: str, header: str, first: int, end: int, total: int) -> None:
    matched = _CONTENT_RANGE.fullmatch(header)
    if not matched or (matched[1], matched[2]) != (str(first), str(end - 1)) or matched[3] not in ("*", str(total)):
        raise SourceError(f"{name_of(address)} sends {header!r:.60} where bytes {first}-{end - 1}/{total} were due.")


@contextmanager
def _source_errors(address: str) -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        raise SourceError(
            f"{name_of(address)} cannot be read: {error}.", advice="Check the network, the address and the certificate."
        ) from error
