"""Every setting of the hub, as `settings.py` has those of the box: the same sources, the same rules.

The environment's prefix is `APPLIANCE_HUB_`. README's table is checked against this file by a test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from appliance.core.errors import SettingsError
from appliance.core.setting_sources import EffectiveSetting, Sources, check_tls, fields_of, load, setting
from appliance.core.settings import HUB_ENVIRONMENT_PREFIX, Bytes, BytesOrZero, Count, Port, Seconds

_OTHER_VARIABLES = frozenset({"APPLIANCE_HUB_CONFIG"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """The hub's effective settings. Immutable: a changed setting needs a restart."""

    # Where
    data_dir: Path = setting(Path("~/.local/share/appliance-hub"), "Folder of database, certificates and releases")
    host: str = setting("127.0.0.1", "Address of the operators' HTTP API; other than loopback needs API keys and TLS")
    port: Port = setting(8090, "TCP port of the operators' HTTP API; 0 picks a free one")
    tls_certificate: Path | None = setting(None, "PEM file with the HTTP server's certificate chain")
    tls_key: Path | None = setting(None, "PEM file with the certificate's private key")
    insecure: bool = setting(False, "Listen beyond loopback without TLS or without API keys, at your own risk")
    require_api_key: bool = setting(False, "Ask for an API key on loopback too")

    # Broker
    broker_host: str = setting("localhost", "Name or address of the MQTT broker, as its certificate has it")
    broker_port: Port = setting(8883, "Port where the broker takes TLS")
    shared_group: str = setting(
        "", "Name under which several hub processes share the devices' messages; empty is one hub"
    )

    # Devices
    approval: Literal["manual", "automatic"] = setting(
        "manual", "Whether a person approves each new box, or its claim certificate is enough"
    )
    certificate_days: Annotated[int, Meta(ge=1, le=3650)] = setting(90, "Days that a device's certificate is valid")
    unreached_days: Annotated[int, Meta(ge=1, le=3650)] = setting(
        7, "Days without a word until a box counts as unreached"
    )
    blocks_bytes_per_s: BytesOrZero = setting(
        0, "Most bytes of updates a second to all devices together over MQTT; 0 is no limit"
    )
    files_port: Port = setting(
        0, "Port where boxes with a certificate fetch files of releases by HTTPS, on every address; 0 offers none"
    )
    files_url: str = setting("", "How boxes reach it; empty is https, the name given to `hub init`, and `files_port`")
    questions_per_minute: Count = setting(600, "Most questions of one device in a minute; more are put off")

    # Telemetry
    telemetry_days: Count = setting(90, "Days that telemetry is kept")
    telemetry_rows: Count = setting(200_000, "Most rows of one stream of one device; the oldest goes first")

    # Limits of a request
    max_body_bytes: Bytes = setting(1024 * 1024, "Largest request body")
    max_header_bytes: Annotated[int, Meta(ge=1024, le=2**24)] = setting(32 * 1024, "Largest request head")
    header_timeout_s: Seconds = setting(10.0, "Longest time for a client to send a request head")
    body_timeout_s: Seconds = setting(30.0, "Longest time for a client to send a request body")
    write_timeout_s: Seconds = setting(60.0, "Longest time for a client to take in what is written to it")
    keep_alive_timeout_s: Seconds = setting(75.0, "Idle time after which a connection is closed")
    max_connections: Count = setting(256, "Open connections; one more is answered 503")
    shutdown_grace_s: Seconds = setting(10.0, "Time for running requests and messages to end after SIGTERM")

    # Observability
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severity that is logged")
    log_format: Literal["auto", "json", "text"] = setting("auto", "auto is text in a terminal and JSON lines otherwise")

    @property
    def database_path(self) -> Path:
        """Return the path of `hub.db`."""
        return self.data_dir / "hub.db"

    @property
    def certificates_dir(self) -> Path:
        """Return the folder of the certificate authority and of what it signed."""
        return self.data_dir / "certificates"

    @property
    def authority_path(self) -> Path:
        """Return the PEM file with the certificate authority, by which devices, broker and hub know each other."""
        return self.certificates_dir / "authority.pem"

    @property
    def hub_certificate_path(self) -> Path:
        """Return the PEM file with the hub's own certificate, its chain included."""
        return self.certificates_dir / "hub.pem"

    @property
    def hub_key_path(self) -> Path:
        """Return the PEM file with the private key of the hub's certificate."""
        return self.certificates_dir / "hub-key.pem"

    @property
    def lock_path(self) -> Path:
        """Return the path of the file whose lock makes a process the one that serves this folder."""
        return self.data_dir / "hub.lock"


def hub_setting_fields() -> dict[str, Field[Any]]:
    """Return every setting's dataclass field by name."""
    return fields_of(HubSettings)


def load_hub_settings(
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> tuple[HubSettings, list[EffectiveSetting]]:
    """Merge the sources and check every value, as `settings.load_settings` does for the box.

    Raises:
        SettingsError: An unknown name, a value of the wrong type or out of range, or an unreadable file.
    """
    settings, effective = load(
        HubSettings(),
        Sources(flags or {}, environment or {}, config_file),
        HUB_ENVIRONMENT_PREFIX,
        other_variables=_OTHER_VARIABLES.__contains__,
        where_listed="README.md lists the hub's settings.",
    )
    _check_together(settings)
    return settings, effective


def _check_together(settings: HubSettings) -> None:
    check_tls(settings.tls_certificate, settings.tls_key)
    if not settings.broker_host or not settings.broker_port:
        missing = "broker_port" if settings.broker_host else "broker_host"
        raise SettingsError(f"{missing} is empty; the hub has to know its broker.", param=missing)
    if settings.files_url and not re.fullmatch(r"https://[!-~]{1,400}", settings.files_url):
        raise SettingsError("files_url is an https address, or empty.", param="files_url")
    if not re.fullmatch(r"[a-z0-9-]{0,64}", settings.shared_group):
        raise SettingsError(
            "shared_group is part of an MQTT topic: it takes up to 64 small letters, digits and dashes.",
            param="shared_group",
        )
