"""Files of releases for boxes, by HTTPS range: a listener of its own, read-only, `GET /sha256-<hex>`.

Who gets in, and why so: a box shows the certificate that it has at the broker, and this end shows the broker's. Both
are there already, so there is no second secret to hand out or to lose, and a model is not public because it is signed.
The operators' door is no place for it: it stays on loopback, and its keys are for people. A certificate is looked up at
each request, so one that is revoked counts no more at once, on connections that stand too. What a box gets it believes
no more than from any mirror: each piece is checked against the signed list.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.core.errors import NotFoundError, PermissionDeniedError
from appliance.hub.enrolments import SqliteEnrolments
from appliance.hub.init import HubFiles, read_hub
from appliance.web.boundary import HttpMetrics, RequestBoundary
from appliance.web.limits import BodyLimit, BodyLimits
from appliance.web.protocol import PEER
from appliance.web.routes import no_such_path
from appliance.web.server import HttpServer

if TYPE_CHECKING:
    from appliance.core.hub_settings import HubSettings
    from appliance.hub.room import Means

_NAME = re.compile(r"sha256-[0-9a-f]{64}")
_PATH = "/{name}"


class ReleaseFile(FileResponse):
    """A file, or a range of it."""

    chunk_size = 256 * 1024


class ReleaseFiles:
    """Answers devices."""

    def __init__(self, folder: Path, *, may_read: Callable[[int], bool]) -> None:
        """Serve what is in a folder.

        Args:
            folder: Holds released files as `sha256-<hex>`; a file that is removed is gone at once.
            may_read: Returns whether a certificate of ours with this serial is a device's, and still counts.
        """
        self._folder = folder
        self._may_read = may_read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            PermissionDeniedError: The certificate is no device's, or counts no more.
            NotFoundError: There is no such file.
        """
        scope["state"]["route"] = _PATH
        if not self._may_read(int(scope["state"][PEER]["serialNumber"], 16)):
            raise PermissionDeniedError(
                "This certificate is no device's, or was revoked.", advice="Enrol the box anew: appliance fleet enrol."
            )
        await self._file(Request(scope).path_params["name"])(scope, receive, send)

    def _file(self, name: str) -> ASGIApp:
        path = self._folder / name
        if not _NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise NotFoundError(f"There is no file {name[:80]!r} of a release here.")
        return ReleaseFile(path, media_type="application/octet-stream")


def create_files_app(settings: HubSettings, files: ReleaseFiles, metrics: HttpMetrics) -> ASGIApp:
    """Return the ASGI application."""
    limit = BodyLimit("max_body_bytes", settings.max_body_bytes)
    return Router(
        routes=[Route(_PATH, files, methods=["GET"])],
        redirect_slashes=False,
        default=no_such_path,
        middleware=[Middleware(BodyLimits, settings, lambda _: limit), Middleware(RequestBoundary, metrics)],
    )


def files_url(settings: HubSettings) -> str:
    """Return where boxes find the files of releases, "" if they are not offered by HTTPS.

    Raises:
        NotFoundError: The hub's name is not known.
    """
    if not settings.files_port:
        return ""
    return settings.files_url or f"https://{read_hub(settings).name}:{settings.files_port}"


def files_server(means: Means) -> HttpServer | None:
    """Return the listener, or None where none is wanted.

    Raises:
        SettingsError: There is no certificate of the broker, or it cannot be used.
    """
    settings = means.settings
    if not settings.files_port:
        return None
    own, enrolments = HubFiles.of(settings), SqliteEnrolments(means.database)
    files = ReleaseFiles(
        settings.data_dir / "blobs",
        may_read=lambda serial: enrolments.counts(f"{serial:x}", now=means.clock.unix()),
    )
    listening = replace(settings, host="", port=settings.files_port, tls_certificate=own.broker, tls_key=own.broker_key)
    app = create_files_app(settings, files, means.metrics)
    return HttpServer(app, listening, client_authority=settings.authority_path)
