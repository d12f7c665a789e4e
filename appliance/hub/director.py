"""The director: signs jobs and desired twins on the hub. Who it is, is itself a signed file of the repository."""

from __future__ import annotations

from pathlib import Path

import msgspec

from appliance.core.errors import StorageError
from appliance.core.releases import DIRECTOR_TARGET, DirectorKeys
from appliance.hub.authority import DIRECTOR, Authority
from appliance.security.envelopes import seal
from appliance.security.signing import SigningKey, list_keys, load_key


class Director:
    """Signs with the newest key that devices believe; a change of keys by another process is noticed at once."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._loaded: tuple[str, SigningKey] | None = None

    def sign(self, payload: bytes, payload_type: str) -> bytes:
        """Return an envelope around a job or a desired twin.

        Raises:
            StorageError: No key on this hub is one that devices believe, or the repository is damaged.
        """
        return seal(payload, payload_type, [self._key()])

    def key_id(self) -> str:
        """Return the id of the key that signs now.

        Raises:
            StorageError: As for `sign`.
        """
        return self._key().id

    def _key(self) -> SigningKey:
        generation = self._authority.repository.generation
        if self._loaded is None or self._loaded[0] != generation:
            believed = director_keys(self._authority).keys
            self._loaded = (generation, _private_half(self._authority.online_folder, believed))
        return self._loaded[1]


def director_keys(authority: Authority) -> DirectorKeys:
    """Return whose jobs count, the newest key first.

    Raises:
        StorageError: There is no list of them, or it is damaged.
    """
    try:
        return msgspec.json.decode(authority.read_target(authority.targets()[DIRECTOR_TARGET]), type=DirectorKeys)
    except (KeyError, msgspec.DecodeError) as error:
        raise StorageError(
            "The signed repository has no list of director keys.",
            advice="Make a new key: appliance hub keys rotate director.",
            code="repository_damaged",
        ) from error


def rotate_director(authority: Authority, *, keep_old: bool) -> str:
    """Make a new director key and return its id; needs the targets keys.

    Args:
        authority: With the folders of the offline keys.
        keep_old: Let what the newest old key has signed count still; not if it may be known to others.

    Raises:
        NotFoundError: The targets keys are not at hand.
        UntrustedError: Someone else changed the repository.
    """
    kept = director_keys(authority).keys[:1] if keep_old else ()
    authority.require_targets_keys()
    made = authority.new_key(DIRECTOR)
    authority.change_targets({DIRECTOR_TARGET: msgspec.json.encode(DirectorKeys((made.public.value, *kept)))})
    return made.id


def _private_half(folder: Path, believed: tuple[str, ...]) -> SigningKey:
    keys = {key.public.value: key for key in (load_key(each.path) for each in list_keys([folder], DIRECTOR))}
    found = [keys[value] for value in believed if value in keys]
    if not found:
        raise StorageError(
            f"No director key in {folder} is one that devices believe.",
            advice="Restore the folder from a backup, or make a new one: appliance hub keys rotate director.",
            code="keys_missing",
        )
    return found[0]
