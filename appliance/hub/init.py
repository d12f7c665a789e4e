"""Makes a hub's folder, step by step; each step is done once, and whoever was killed on the way goes on where he was.

hub.json                    under which name and port boxes reach the broker, and how many signing keys there are
certificates/               the authority and its key, the broker's, the hub's own, and who is revoked
keys/  offline-keys/        signing keys that stay on the hub, and those to be carried away
repository/                 the signed releases
hub.db                      everything else
broker/mosquitto.conf       ready to start: mosquitto -c
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError, NotFoundError, StorageError
from appliance.core.hub_settings import HubSettings
from appliance.hub.authority import ROOT_PLAN, TARGETS_PLAN, KeyPlan
from appliance.hub.authority import Authority as ReleaseAuthority
from appliance.hub.broker import BrokerFiles, BrokerSettings, write_broker
from appliance.hub.schema import MIGRATIONS
from appliance.security.audit import local_actor, record
from appliance.security.certificates import HUB_NAME, Authority, Identity
from appliance.store.database import Connection, Database
from appliance.store.files import storage_errors
from appliance.store.locks import Hold, lock
from appliance.store.private_files import read_file, sweep_unfinished, write_file

_WAIT_S = 30.0
_PUBLIC = 0o644


class HubDocument(Struct, frozen=True):
    """`hub.json`.

    Attributes:
        name: Host name or address under which boxes reach the broker.
        port: Its port.
        root_keys: Offline keys of the root.
        root_threshold: How many of them have to sign.
        targets_keys: Offline keys of the releases.
        targets_threshold: How many of them have to sign.
    """

    name: Annotated[str, Meta(min_length=1, max_length=253)]
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8883
    root_keys: int = ROOT_PLAN.keys
    root_threshold: int = ROOT_PLAN.threshold
    targets_keys: int = TARGETS_PLAN.keys
    targets_threshold: int = TARGETS_PLAN.threshold


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Where the certificates and the broker's files are."""

    document: Path
    authority: Path
    authority_key: Path
    hub: Path
    hub_key: Path
    broker: Path
    broker_key: Path
    revoked: Path
    broker_folder: Path

    @classmethod
    def of(cls, settings: HubSettings) -> HubFiles:
        """Return the files of a hub's folder."""
        certificates = settings.authority_path.parent
        return cls(
            document=settings.data_dir / "hub.json",
            authority=settings.authority_path,
            authority_key=certificates / "authority-key.pem",
            hub=settings.hub_certificate_path,
            hub_key=settings.hub_key_path,
            broker=certificates / "broker.pem",
            broker_key=certificates / "broker-key.pem",
            revoked=certificates / "revoked.pem",
            broker_folder=settings.data_dir / "broker",
        )

    @property
    def configuration(self) -> Path:
        """Return the broker's configuration."""
        return self.broker_folder / "mosquitto.conf"

    @property
    def broker_process(self) -> Path:
        """Return the file where whoever starts the broker notes its process id."""
        return self.broker_folder / "mosquitto.pid"


def read_hub(settings: HubSettings) -> HubDocument:
    """Return what `init` was told.

    Raises:
        NotFoundError: There is no hub in the folder.
        StorageError: The file does not hold what it should.
    """
    path = HubFiles.of(settings).document
    content = read_file(path)
    if content is None:
        raise NotFoundError(
            f"There is no hub in {settings.data_dir}.",
            advice="Make one with: appliance hub init --data FOLDER --name HOST",
        )
    try:
        return msgspec.json.decode(content, type=HubDocument)
    except msgspec.DecodeError as error:
        raise StorageError(
            f"{path} does not hold what it should: {error}.", advice="Restore it from a backup."
        ) from error


def init_hub(settings: HubSettings, wanted: HubDocument, clock: Clock, *, passphrase: str | None = None) -> list[str]:
    """Make what is not there yet of a hub, and return what was made, in words.

    Args:
        settings: Say where.
        wanted: Name, port and keys.
        clock: For certificates and signatures.
        passphrase: Encrypts the offline keys.

    Raises:
        ConflictError: There is a hub with another name, port or plan of keys; nothing was changed.
        InvalidRequestError: The name is none, or the plan cannot be kept.
        StorageError: The disk does not allow it.
    """
    plans = KeyPlan(wanted.root_keys, wanted.root_threshold), KeyPlan(wanted.targets_keys, wanted.targets_threshold)
    files = HubFiles.of(settings)
    with _alone(settings.data_dir):
        _check_same(settings, wanted)
        sweep_unfinished(files.authority.parent)
        steps: list[tuple[str, bool, Callable[[], object]]] = [
            (
                "its name and port",
                files.document.exists(),
                lambda: write_file(files.document, msgspec.json.encode(wanted)),
            ),
            ("a certificate authority", files.authority.exists(), lambda: _make_authority(files, wanted, clock)),
            (
                "a certificate of the broker",
                files.broker.exists(),
                lambda: _keep(
                    _authority(files).server(_names(wanted.name), clock.unix()), files.broker, files.broker_key
                ),
            ),
            (
                "a certificate of the hub",
                files.hub.exists(),
                lambda: _keep(_authority(files).client(HUB_NAME, clock.unix()), files.hub, files.hub_key),
            ),
            (
                "a list of revoked certificates",
                files.revoked.exists(),
                lambda: write_file(files.revoked, _authority(files).revocations({}, clock.unix()), mode=_PUBLIC),
            ),
            *_release_steps(settings, plans, clock, passphrase),
            ("a database", settings.database_path.exists(), lambda: _make_database(settings, wanted, clock)),
            ("a configuration of the broker", files.configuration.exists(), lambda: _configure_broker(files, wanted)),
        ]
        return [what for what, _, make in (step for step in steps if not step[1]) if (make(), True)]


def load_authority(settings: HubSettings) -> Authority:
    """Return the hub's certificate authority.

    Raises:
        NotFoundError: There is none.
        InvalidRequestError: Its files do not hold what they should.
    """
    return _authority(HubFiles.of(settings))


def _release_steps(
    settings: HubSettings, plans: tuple[KeyPlan, KeyPlan], clock: Clock, passphrase: str | None
) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    releases = ReleaseAuthority(settings.data_dir, clock, passphrase=passphrase)
    yield "signing keys and a signed repository", releases.repository.exists, lambda: releases.create(*plans)


def _check_same(settings: HubSettings, wanted: HubDocument) -> None:
    try:
        there = read_hub(settings)
    except NotFoundError:
        return
    if there != wanted:
        raise ConflictError(
            f"There is a hub in {settings.data_dir}: {there.name}, port {there.port}, "
            f"{there.root_threshold} of {there.root_keys} root keys, "
            f"{there.targets_threshold} of {there.targets_keys} targets keys. Nothing was changed.",
            advice="Repeat the command with these, or name another folder with --data.",
        )


def _names(name: str) -> list[str]:
    """Return the names of the broker: whoever runs on its machine may reach it as localhost."""
    return list(dict.fromkeys((name, "localhost", "127.0.0.1", "::1")))


def _make_authority(files: HubFiles, wanted: HubDocument, clock: Clock) -> None:
    authority = Authority.create(f"Fleet of {wanted.name}"[:64], clock.unix())
    _keep(authority.identity, files.authority, files.authority_key)


def _keep(identity: Identity, certificate: Path, key: Path) -> None:
    """Keep a certificate and its key; the certificate comes last and says that both are there."""
    write_file(key, identity.key)
    write_file(certificate, identity.certificate, mode=_PUBLIC)


def _authority(files: HubFiles) -> Authority:
    certificate, key = read_file(files.authority), read_file(files.authority_key)
    if certificate is None or key is None:
        raise NotFoundError(
            f"There is no certificate authority in {files.authority.parent}.",
            advice="Make the hub with: appliance hub init --data FOLDER --name HOST",
        )
    return Authority(Identity(certificate, key))


def _make_database(settings: HubSettings, wanted: HubDocument, clock: Clock) -> None:
    def note(connection: Connection) -> None:
        record(connection, local_actor(), "hub.init", wanted.name, msgspec.to_builtins(wanted), at=clock.unix())

    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        database.write_blocking(note)


def _configure_broker(files: HubFiles, wanted: HubDocument) -> None:
    with storage_errors(files.broker_folder):
        files.broker_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificates = BrokerFiles(
        authority=files.authority, certificate=files.broker, key=files.broker_key, revoked=files.revoked
    )
    write_broker(files.broker_folder, certificates, BrokerSettings(port=wanted.port))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = lock(folder / "init.lock", os.O_RDWR | os.O_CREAT, exclusive=True, wait_s=_WAIT_S)
        except BlockingIOError as error:
            raise ConflictError("Another process is making this hub.", advice="Wait for it, and try again.") from error
    with Hold([descriptor]):
        yield
