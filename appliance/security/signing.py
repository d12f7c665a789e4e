"""Ed25519 keys that sign: made here, kept as PKCS#8 files of mode 0600, under a passphrase where one is given.

    <role>-<first 16 characters of the key's id>.pem

A key's id is the SHA-256 of its public half in the canonical form of TUF, so nobody can give a key another's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError, UntrustedError
from appliance.store.files import open_regular, storage_errors, sync_folder, write_durably

_ID_IN_NAME = 16
_NAME = re.compile(r"([a-z][a-z0-9-]{0,30})-([0-9a-f]{16})\.pem")
_VALUE = re.compile(r"[0-9a-f]{64}")
_LARGEST_FILE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The public half of an Ed25519 key.

    Attributes:
        value: 32 bytes in lower-case hex.
    """

    value: str

    def __post_init__(self) -> None:
        if not _VALUE.fullmatch(self.value):
            raise UntrustedError(f"{self.value!r:.80} is no Ed25519 key: 64 characters of lower-case hex are.")

    @property
    def library_key(self) -> SSlibKey:
        """Return it as securesystemslib and tuf want it."""
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.value)))

    @property
    def id(self) -> str:
        """Return the SHA-256 of its canonical form, in hex."""
        return self.library_key.keyid


class SigningKey:
    """Both halves of an Ed25519 key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.signer = CryptoSigner(private)
        """Signs for securesystemslib and tuf."""
        self.public = PublicKey(private.public_key().public_bytes_raw().hex())

    @property
    def id(self) -> str:
        """Return the id of the public half."""
        return self.public.id

    def encoded(self, passphrase: str | None) -> bytes:
        """Return it as PKCS#8 in PEM, encrypted if there is a passphrase."""
        encryption: KeySerializationEncryption = NoEncryption()
        if passphrase is not None:
            encryption = BestAvailableEncryption(passphrase.encode())
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key file as its name tells; `id_start` are the first 16 characters of the key's id."""

    path: Path
    role: str
    id_start: str


def make_key() -> SigningKey:
    """Return a new key."""
    return SigningKey(Ed25519PrivateKey.generate())


def store_key(key: SigningKey, folder: Path, role: str, *, passphrase: str | None = None) -> Path:
    """Write a key to a folder, which is made if need be (0700), and return the file.

    Raises:
        InvalidRequestError: The passphrase is empty.
        ConflictError: The key is there already.
        StorageError: It cannot be written.
    """
    if passphrase is not None and not passphrase:
        raise InvalidRequestError("A signing key cannot be encrypted with an empty passphrase.")
    path = folder / f"{role}-{key.id[:_ID_IN_NAME]}.pem"
    with storage_errors(folder):
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True)
            sync_folder(folder.parent)
        if path.exists():
            raise ConflictError(f"The key {path} is there already; nothing was changed.")
    write_durably(path, key.encoded(passphrase), mode=0o600)
    return path


def load_key(path: Path, *, passphrase: str | None = None) -> SigningKey:
    """Read a key.

    Raises:
        NotFoundError: There is no such file.
        UntrustedError: It is no Ed25519 key, the passphrase is wrong or missing, or the file's name is another key's.
    """
    with storage_errors(path), open_regular(path) as file:
        data = file.read(_LARGEST_FILE_BYTES)
    advice = "Is the passphrase right?" if passphrase is not None else "If it is encrypted, give its passphrase."
    try:
        private = load_pem_private_key(data, None if passphrase is None else passphrase.encode())
    except TypeError as error:  # the library's word for a passphrase that is missing, or not needed
        if passphrase is not None:
            return load_key(path)
        raise UntrustedError(
            f"The signing key {path} is encrypted.",
            advice="Set APPLIANCE_KEYS_PASSPHRASE, or answer the prompt in a terminal.",
            code="passphrase_needed",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UntrustedError(f"The signing key {path} cannot be read.", advice=advice, code="bad_key") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise UntrustedError(f"{path} is no Ed25519 key.", code="bad_key")
    key = SigningKey(private)
    named = _NAME.fullmatch(path.name)
    if named and named[2] != key.id[:_ID_IN_NAME]:
        raise UntrustedError(f"{path} holds another key than its name says.", code="bad_key")
    return key


def list_keys(folders: Iterable[Path], role: str | None = None) -> list[StoredKey]:
    """Return the key files of folders, of one role or of all; folders that are not there have none."""
    found = []
    for folder in folders:
        with storage_errors(folder):
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in paths:
            match = _NAME.fullmatch(path.name)
            if match and role in (None, match[1]):
                found.append(StoredKey(path, match[1], match[2]))
    return found


def load_keys(
    folders: Sequence[Path], role: str, ids: Iterable[str], threshold: int, *, passphrase: str | None = None
) -> list[SigningKey]:
    """Read as many keys of a role as its threshold asks for.

    Args:
        folders: Where to look.
        role: Whose keys.
        ids: Of the keys whose signature counts.
        threshold: How many there must be.
        passphrase: Of those that are encrypted.

    Raises:
        NotFoundError: There are not enough of them; the message says where it looked.
        UntrustedError: One cannot be read.
    """
    wanted = {each[:_ID_IN_NAME] for each in ids}
    files = {each.id_start: each.path for each in list_keys(folders, role) if each.id_start in wanted}
    if len(files) < threshold:
        places = ", ".join(str(each) for each in folders) or "no folder"
        raise NotFoundError(
            f"{threshold} of the {len(wanted)} {role} keys must sign, and {len(files)} were found in {places}.",
            advice="Bring the folder with the offline keys and name it with --keys; it may be given more than once.",
            code="keys_missing",
        )
    return [load_key(path, passphrase=passphrase) for _, path in sorted(files.items())[:threshold]]
