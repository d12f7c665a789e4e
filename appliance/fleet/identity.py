"""Who this box is to its hub: a folder of small files, each whole or not there.

    instance                 made up once by each installation; another one under the same id is a clone
    claim.json               the bundle of an enrolment that is under way, with the id that is wanted
    request-key.pem          the key of a certificate that was asked for; it never leaves the box
    authority.pem  root.json  hub.json   the hub's certificate authority, its first TUF root, and where its broker is
    credentials.pem          key and certificate chain in one file, so that they change together
    credentials-before.pem   the ones before a renewal, until the new ones have worked
    credentials-spare.pem    the ones in use, while these two change places

A box is enrolled from the moment `credentials.pem` is there; everything else is written before it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from appliance.core.errors import NotFoundError, StorageError
from appliance.core.fleet import ClaimBundle, DeviceId
from appliance.store.private_files import read_file, remove_file, rename_file, sweep_unfinished, write_file

S = TypeVar("S", bound=Struct)


class HubAddress(Struct, frozen=True):
    """`hub.json`: which id the box has at which broker."""

    device: DeviceId
    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65_535)]


class PendingClaim(Struct, frozen=True):
    """`claim.json`: an enrolment that has begun."""

    device: DeviceId
    bundle: ClaimBundle


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled box.

    Attributes:
        device: Its id.
        instance: Of this installation.
        host: Where the broker listens.
        port: Its port.
        authority: File with the hub's certificate authority.
        credentials: File with key and certificate chain.
        root: File with the first root of the signed repository.
        on_trial: Whether the credentials were renewed and have never worked yet.
    """

    device: str
    instance: str
    host: str
    port: int
    authority: Path
    credentials: Path
    root: Path
    on_trial: bool


class IdentityFolder:
    """Owns the folder; only one program at a time may change it."""

    def __init__(self, folder: Path) -> None:
        """Look at a folder, which need not be there: nothing is made before there is something to keep."""
        self.folder = folder
        self.authority = folder / "authority.pem"
        self.root = folder / "root.json"
        self._hub = folder / "hub.json"
        self._instance = folder / "instance"
        self._claim = folder / "claim.json"
        self._request_key = folder / "request-key.pem"
        self.credentials = folder / "credentials.pem"
        self._before = folder / "credentials-before.pem"
        self._spare = folder / "credentials-spare.pem"

    def instance(self) -> str:
        """Return the id of this installation; the first call makes it up.

        Raises:
            StorageError: It cannot be kept.
        """
        if (there := read_file(self._instance)) is not None and there.strip():
            return there.decode("ascii", "replace").strip()
        made = secrets.token_hex(16)
        write_file(self._instance, made.encode())
        return made

    def identity(self) -> Identity | None:
        """Return who the box is, or None if it is not enrolled.

        Raises:
            StorageError: A file cannot be read, or does not hold what it should.
        """
        if not self.credentials.exists():
            return None
        address = _decoded(self._hub, read_file(self._hub), HubAddress)
        return Identity(
            device=address.device,
            instance=self.instance(),
            host=address.host,
            port=address.port,
            authority=self.authority,
            credentials=self.credentials,
            root=self.root,
            on_trial=self._before.exists(),
        )

    def pending(self) -> PendingClaim | None:
        """Return the enrolment that is under way, or None.

        Raises:
            StorageError: The file cannot be read, or does not hold what it should.
        """
        content = read_file(self._claim)
        return None if content is None else _decoded(self._claim, content, PendingClaim)

    def begin(self, claim: PendingClaim) -> None:
        """Remember an enrolment, so that it goes on after a restart; another one that was under way is forgotten."""
        sweep_unfinished(self.folder)
        before = self.pending()
        if before is not None and before.device != claim.device:
            remove_file(self._request_key)
        write_file(self._claim, msgspec.json.encode(claim))

    def claim_credentials(self, claim: PendingClaim) -> tuple[Path, Path]:
        """Write the claim's own credentials and authority where a connection can read them, and return the files."""
        credentials, authority = self.folder / "claim-credentials.pem", self.folder / "claim-authority.pem"
        write_file(credentials, claim.bundle.credentials.encode())
        write_file(authority, claim.bundle.authority.encode())
        return credentials, authority

    def request_key(self) -> bytes | None:
        """Return the key of the certificate that was asked for last and has not come yet, or None."""
        return read_file(self._request_key)

    def keep_request_key(self, key: bytes) -> None:
        """Keep a key before its certificate is asked for."""
        write_file(self._request_key, key)

    def drop_request_key(self) -> None:
        """Forget the key: its certificate is kept with it elsewhere, or is wanted no more."""
        remove_file(self._request_key)

    def enrol(self, claim: PendingClaim, credentials: bytes) -> None:
        """Become that device. Killed at any step, the box is either not enrolled yet or is so wholly.

        Args:
            claim: The enrolment that is done.
            credentials: PEM of the key and of the certificate chain, which belong together.
        """
        write_file(self.authority, claim.bundle.authority.encode())
        write_file(self.root, claim.bundle.root.encode())
        bundle = claim.bundle
        write_file(self._hub, msgspec.json.encode(HubAddress(claim.device, bundle.host, bundle.port)))
        remove_file(self._before)
        write_file(self.credentials, credentials)
        self.tidy()

    def tidy(self) -> None:
        """Finish what was killed: called at the start, and at the end of an enrolment.

        Raises:
            StorageError: A file cannot be read or changed.
        """
        self._finish_exchange()
        if self.credentials.exists() and self._claim.exists():
            for path in (self._request_key, *self._claim_files(), self._claim):
                remove_file(path)

    def try_credentials(self, credentials: bytes) -> None:
        """Use renewed credentials from the next connecting on; those that work are kept beside them."""
        if not self._before.exists() and (working := read_file(self.credentials)) is not None:
            write_file(self._before, working)
        write_file(self.credentials, credentials)
        remove_file(self._request_key)

    def confirm_credentials(self) -> bool:
        """Forget the other credentials, for these have worked; return False if there were no others."""
        there = self._before.exists()
        remove_file(self._before)
        return there

    def exchange_credentials(self) -> bool:
        """Use the other credentials of a renewal from the next connecting on; return False if there are none.

        Both are kept, for whether the broker refused them or was merely away is not known.
        """
        current, other = read_file(self.credentials), read_file(self._before)
        if current is None or other is None:
            return False
        write_file(self._spare, current)
        write_file(self.credentials, other)
        rename_file(self._spare, self._before)
        return True

    def _finish_exchange(self) -> None:
        if (spare := read_file(self._spare)) is None:
            return
        if spare == read_file(self.credentials):
            remove_file(self._spare)
        else:
            rename_file(self._spare, self._before)

    def leave(self) -> None:
        """Forget the hub. The installation keeps its instance, so that it is known again when it comes back.

        Raises:
            NotFoundError: The box is neither enrolled nor enrolling.
        """
        if not self.credentials.exists() and not self._claim.exists():
            raise NotFoundError("This box is not enrolled at a hub.", advice="appliance fleet enrol BUNDLE enrols it.")
        for path in (self.credentials, self._before, self._spare, self._request_key, self._claim, *self._claim_files()):
            remove_file(path)
        for path in (self._hub, self.authority, self.root):
            remove_file(path)

    def _claim_files(self) -> tuple[Path, Path]:
        return self.folder / "claim-credentials.pem", self.folder / "claim-authority.pem"


def _decoded(path: Path, content: bytes | None, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(content or b"", type=kind)
    except msgspec.DecodeError as error:
        raise StorageError(
            f"{path} does not hold what it should: {error}.",
            advice="Enrol the box anew: appliance fleet leave, then appliance fleet enrol BUNDLE.",
        ) from error
