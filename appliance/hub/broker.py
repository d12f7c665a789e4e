"""The configuration of mosquitto 2.0, ready to start: mutual TLS, who may do what, and limits.

    mosquitto.conf   listener, certificates, limits
    mosquitto.acl    each device its own branch, by its certificate's name; claims only ea/1/claim/…; the hub its side
    data/            what the broker keeps over a restart

Mosquitto takes a certificate's common name as user name *and* as client id, so no device can push another one off, and
checks the ACL at each message. It grants every subscription and then delivers nothing that may not be read.
"""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass, field
from pathlib import Path

from appliance.core.errors import InvalidRequestError
from appliance.core.fleet import CLAIM_ANSWER, CLAIM_REQUEST, ROOT
from appliance.security.certificates import CLAIM_NAME, HUB_NAME
from appliance.store.files import write_durably

CONFIGURATION = "mosquitto.conf"
ACCESS = "mosquitto.acl"
DATA = "data"

LARGEST_PACKET_BYTES = 1024 * 1024 + 64 * 1024


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container may run under a number that has no name
        return ""


@dataclass(frozen=True, slots=True)
class BrokerFiles:
    """The broker's certificates, PEM: who signed the devices', its own with its key, and who is revoked."""

    authority: Path
    certificate: Path
    key: Path
    revoked: Path


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """Where and how the broker works.

    Attributes:
        port: For MQTT over TLS.
        address: To listen on, "" for all.
        user: The user that a broker started by root becomes; it must be able to read the private key, so it is by
            default who writes the configuration.
        most_connections: Beyond which the broker takes no more.
        most_queued: Messages for a client that is away or slow; more are dropped without a word. What the broker keeps
            of all devices (two messages of each) counts for a hub that has just connected.
        most_queued_bytes: The same in bytes.
        save_every_s: Between writes of what is kept over a restart.
    """

    port: int = 8883
    address: str = ""
    user: str = field(default_factory=_own_name)
    most_connections: int = 20_000
    most_queued: int = 100_000
    most_queued_bytes: int = 128 * 1024 * 1024
    save_every_s: int = 60


def write_broker(folder: Path, files: BrokerFiles, settings: BrokerSettings) -> Path:
    """Write the configuration and the ACL; the same call with other settings writes them anew.

    Args:
        folder: Of the broker; made if it is not there.
        files: All must be there before the broker starts.
        settings: Where and how it works.

    Returns:
        The configuration, for `mosquitto -c`.

    Raises:
        StorageError: They cannot be written.
        InvalidRequestError: A path or a name cannot stand in a configuration.
    """
    folder = folder.absolute()
    text = _configuration(folder, files, settings)
    (folder / DATA).mkdir(parents=True, exist_ok=True)
    write_durably(folder / ACCESS, _access().encode())
    write_durably(folder / CONFIGURATION, text.encode())
    return folder / CONFIGURATION


def _configuration(folder: Path, files: BrokerFiles, settings: BrokerSettings) -> str:
    options: list[tuple[str, object]] = [
        ("per_listener_settings", "false"),
        ("allow_anonymous", "false"),
        ("acl_file", folder / ACCESS),
        ("user", settings.user),
        ("persistence", "true"),
        ("persistence_location", f"{folder / DATA}/"),
        ("autosave_interval", settings.save_every_s),
        ("persistent_client_expiration", "7d"),
        ("max_packet_size", LARGEST_PACKET_BYTES),
        ("max_inflight_messages", 1000),
        ("max_queued_messages", settings.most_queued),
        ("max_queued_bytes", settings.most_queued_bytes),
        ("max_keepalive", 300),
        ("set_tcp_nodelay", "true"),
        ("connection_messages", "false"),
        ("log_dest", "stderr"),
        ("log_type", "error"),
        ("log_type", "warning"),
        ("log_type", "notice"),
        ("listener", f"{settings.port} {settings.address}".strip()),
        ("max_connections", settings.most_connections),
        ("max_topic_alias", 0),
        ("max_qos", 1),
        ("cafile", files.authority.absolute()),
        ("certfile", files.certificate.absolute()),
        ("keyfile", files.key.absolute()),
        ("crlfile", files.revoked.absolute()),
        ("tls_version", "tlsv1.2"),
        ("require_certificate", "true"),
        ("use_identity_as_username", "true"),
        ("use_username_as_clientid", "true"),
    ]
    lines = [_line(name, str(value)) for name, value in options if value != ""]
    return "# Made by `appliance hub init`; see mosquitto.conf(5).\n" + "\n".join(lines) + "\n"


def _line(name: str, value: str) -> str:
    if not value.isprintable():
        raise InvalidRequestError(f"The broker's {name} cannot be {value!r}: it has characters that do not print.")
    return f"{name} {value}"


def _access() -> str:
    denied = "\n".join(f"topic deny {ROOT}/{branch}/#" for branch in ("up", "dn", "all"))
    return f"""\
# Made by `appliance hub init`. A pattern holds for everybody, so what a claim must not reach is denied to it by name.
user {HUB_NAME}
topic readwrite {ROOT}/up/#
topic readwrite {ROOT}/dn/#
topic readwrite {ROOT}/all/#
topic read {CLAIM_REQUEST}/+
topic write {CLAIM_ANSWER}/+
topic read $SYS/broker/#

user {CLAIM_NAME}
{denied}
topic write {CLAIM_REQUEST}/+
topic read {CLAIM_ANSWER}/+

pattern write {ROOT}/up/%u/#
pattern read {ROOT}/dn/%u/#
pattern read {ROOT}/all/#
"""
