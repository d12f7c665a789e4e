"""What the verbs that talk to a running server share: its address, the key and the certificate to trust."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.core.settings import Settings

if TYPE_CHECKING:
    from appliance.cli.chat_client import ChatClient

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  (read, not listened on)


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--url`, `--api-key` and `--ca`, for `open_client`."""
    options = (
        click.option("--url", help="Address of the server; by default the one these settings start."),
        click.option("--api-key", envvar="APPLIANCE_API_KEY", default="", help="API key; better in APPLIANCE_API_KEY."),
        click.option(
            "--ca",
            type=click.Path(path_type=Path),
            help="PEM file with a certificate to trust besides the machine's.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def open_client(settings: Settings, *, url: str | None, api_key: str, ca: Path | None) -> ChatClient:
    """Return a client of the server at `url`, or of the one that the settings start.

    Raises:
        InvalidRequestError: The address, the key or the file is none.
    """
    from appliance.cli.chat_client import ChatClient

    authority = ca or (None if url else settings.tls_certificate)
    return ChatClient(url or _own_url(settings), api_key=api_key, certificate_authority=authority)


def _own_url(settings: Settings) -> str:
    host = _EVERYWHERE.get(settings.host, settings.host)
    scheme = "http" if settings.tls_certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"
