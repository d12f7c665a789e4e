"""A file from an https address, going on where an earlier attempt stopped.

Protocol: range requests of RFC 9110, section 14, with `If-Range` so that a file that changed meanwhile starts anew.
The server is not believed: what it announces must agree with what is wanted, and it is cut off at that size.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from urllib.parse import unquote, urljoin
from urllib.request import getproxies, proxy_bypass

import truststore
from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Retry, Timeout, make_headers
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError, ReadTimeoutError
from urllib3.exceptions import SSLError as TLSError
from urllib3.util import Url, parse_url

from appliance import __version__
from appliance.core.errors import InvalidRequestError, SourceError
from appliance.registry.blobs import Edition, Partial
from appliance.registry.files import Progress, no_progress
from appliance.registry.urls import check_url, is_loopback, shown

CHUNK_BYTES = 64 * 1024
MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 15.0

_REQUESTS = Retry(
    total=6,
    connect=2,
    read=0,
    status=3,
    other=0,
    backoff_factor=0.3,
    status_forcelist=(429, 500, 502, 503, 504),
    raise_on_status=False,
    respect_retry_after_header=False,  # a server must not make us wait for as long as it likes
)
"""Which faults before the body are tried again, and how often."""

_BODIES = Retry(total=4, backoff_factor=0.3)
"""How often a body that broke off is gone on with, counted anew after every `_PROGRESS_BYTES`."""

_PROGRESS_BYTES = 1024 * 1024

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class DeniedError(SourceError):
    """There is no way in for us: no route, no credentials, no trust. Another program's settings may have one."""

    default_code = "source_denied"


def fetch(
    address: str, partial: Partial, size: int, *, stall_timeout_s: float, progress: Progress = no_progress
) -> None:
    """Fill the partial file up to `size` bytes from an address.

    Args:
        address: https, or http on loopback.
        partial: Where the bytes go; it may hold the beginning already.
        size: Of the whole file.
        stall_timeout_s: Longest silence of the server before it is given up.
        progress: Told as the bytes come.

    Raises:
        SourceError: The server cannot be reached, fell silent, or has another file. What came stays for the next try.
        DeniedError: It cannot be reached, wants credentials, or its certificate is not trusted.
        InvalidRequestError: The address is not one we fetch from.
        StorageError: The disk is full.
    """
    tries, most = _BODIES, partial.size
    progress("downloading", partial.size, size)
    while partial.size < size:
        try:
            _fetch_once(address, partial, size, stall_timeout_s, progress)
        except HTTPError as error:
            if partial.size >= most + _PROGRESS_BYTES:
                tries, most = _BODIES, partial.size
            reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
            _refuse_final(error, reason, f"{name_of(address)} at {partial.size:,} of {size:,} bytes")
            try:
                tries = tries.increment()
            except MaxRetryError as given_up:
                raise SourceError(
                    f"The source broke off again and again: {name_of(address)}: {reason}.",
                    advice="Check the network; repeat the command to go on where it stopped.",
                ) from given_up
            tries.sleep()


def _fetch_once(address: str, partial: Partial, size: int, stall_timeout_s: float, progress: Progress) -> None:
    before = partial.size
    with _open(address, partial, stall_timeout_s) as response:
        _prepare(response, address, partial, size)
        for chunk in response.stream(CHUNK_BYTES, decode_content=False):
            if partial.size + len(chunk) > size:
                raise SourceError(f"{name_of(address)} sends more than the {size:,} bytes the file has.")
            partial.append(chunk)
            progress("downloading", partial.size, size)
    if partial.size <= before:
        raise SourceError(f"{name_of(address)} ended after {partial.size:,} of {size:,} bytes.")


def _refuse_final(error: HTTPError, reason: Exception, where: str) -> None:
    """Raise what trying again will not help with."""
    if isinstance(reason, ReadTimeoutError):
        raise SourceError(
            f"The source fell silent: {where}.",
            advice="Repeat the command to go on from there; the setting download_timeout_s allows longer silence.",
        ) from error
    if isinstance(error, MaxRetryError) and isinstance(reason, TLSError):
        raise DeniedError(
            f"The source could not prove who it is: {where}: {reason}.",
            advice="Add its certificate authority to the system's, or name it in SSL_CERT_FILE. Also check the clock.",
        ) from error
    if isinstance(error, MaxRetryError) and not isinstance(reason, ProtocolError):
        raise DeniedError(
            f"The source cannot be reached: {where}: {reason}.",
            advice="Check the network, the proxy (https_proxy, no_proxy) and the address.",
            code=SourceError.default_code,
        ) from error


@contextmanager
def _open(address: str, partial: Partial, stall_timeout_s: float) -> Iterator[BaseHTTPResponse]:
    """Ask for what is missing, following redirects to other https addresses."""
    headers: dict[str, str] = {}
    if partial.size:
        headers["Range"] = f"bytes={partial.size}-"
        edition = partial.edition
        if edition and edition.url == address:
            headers["If-Range"] = edition.etag
    with get(address, headers, stall_timeout_s) as response:
        yield response


@contextmanager
def get(
    address: str, headers: Mapping[str, str], stall_timeout_s: float, context: ssl.SSLContext | None = None
) -> Iterator[BaseHTTPResponse]:
    """Send a GET with these headers beside our own, and yield the answer, its body not read yet.

    Redirects to other https addresses are followed.

    Args:
        address: https, or http on loopback.
        headers: More of them.
        stall_timeout_s: Longest silence of the server.
        context: Whom to believe, and what to show; without it whom the system believes, and nothing.

    Raises:
        InvalidRequestError: The address is not one we fetch from.
        SourceError: It leads to one, or in circles.
        HTTPError: The server cannot be reached, or says nothing for so long.
    """
    url = check_url(address)
    headers = {"User-Agent": f"appliance/{__version__}", "Accept-Encoding": "identity", **headers}
    for _ in range(MAX_REDIRECTS + 1):
        with ExitStack() as stack:
            response = stack.enter_context(
                stack.enter_context(_pool(url, context)).request(
                    "GET",
                    url._replace(auth=None, fragment=None).url,
                    headers=headers | (make_headers(basic_auth=unquote(url.auth)) if url.auth else {}),
                    timeout=Timeout(connect=min(CONNECT_TIMEOUT_S, stall_timeout_s), read=stall_timeout_s),
                    preload_content=False,
                    redirect=False,
                    retries=_REQUESTS,
                )
            )
            location = response.get_redirect_location()
            if not location:
                yield response
                return
            url = _redirected(url, location)
    raise SourceError(f"{name_of(address)} was redirected more than {MAX_REDIRECTS} times.")


def _redirected(url: Url, location: str) -> Url:
    try:
        target = check_url(urljoin(url.url, location))
    except (InvalidRequestError, ValueError) as error:
        raise SourceError(f"{shown(url)} leads to an address that is not followed: {error}") from error
    if url.scheme == "https" and target.scheme != "https":
        raise SourceError(f"{shown(url)} leads from https to {shown(target)}, which is not followed.")
    return target


def _prepare(response: BaseHTTPResponse, address: str, partial: Partial, size: int) -> None:
    """Check the answer's head against what is wanted, and bring the partial file to where the body begins."""
    name, status = name_of(address), response.status
    if status in (401, 403, 407):
        raise DeniedError(f"{name} answered {status}: it wants credentials that it did not get.")
    if status == 416 and partial.size:
        size_before = partial.size
        partial.restart()
        raise HTTPError(f"it has no byte {size_before:,}")
    if status not in (200, 206):
        raise SourceError(f"{name} answered with the HTTP status {status}.")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise SourceError(f"{name} sends the file compressed ({encoding!r:.40}), which was not asked for.")
    if status == 206:
        matched = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not matched or int(matched[1]) != partial.size or matched[3] not in ("*", str(size)):
            found = response.headers.get("Content-Range", "no range")
            raise SourceError(f"{name} sends {found!r:.60} where bytes {partial.size}-{size - 1}/{size} were due.")
    else:
        announced = response.headers.get("Content-Length")
        if announced not in (None, str(size)):
            raise SourceError(f"{name} has a file of {announced:.20} bytes, not the one of {size:,}.")
        partial.restart()
    etag = response.headers.get("ETag", "")
    if etag.startswith('"') and len(etag) <= 256:  # a weak one promises no equal bytes
        partial.edition = Edition(address, etag)


def _pool(url: Url, context: ssl.SSLContext | None) -> PoolManager:
    """Return a connection pool that trusts what the system trusts and takes the way that the environment names."""
    context = context or truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    host, scheme = url.host or "", url.scheme or ""
    proxy = getproxies().get(scheme)
    if proxy and not is_loopback(host) and not proxy_bypass(host):
        auth = parse_url(proxy).auth
        headers = make_headers(proxy_basic_auth=unquote(auth)) if auth else None
        return ProxyManager(proxy, proxy_headers=headers, ssl_context=context, num_pools=1)
    return PoolManager(ssl_context=context, num_pools=1)


def name_of(address: str) -> str:
    """Return an address as it is shown."""
    return shown(parse_url(address))
