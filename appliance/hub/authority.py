"""Who signs what: the keys of the signed repository, and every change of it.

The keys of root and targets are kept offline, in folders that are there only while a person signs; those of snapshot,
timestamp and director lie on the hub. So a hub that is taken over can choose among signed releases, and make none.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from appliance.core.clock import Clock, iso_timestamp
from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.releases import DIRECTOR_TARGET, DirectorKeys
from appliance.hub.key_plan import ROOT_PLAN, TARGETS_PLAN, KeyPlan, RoleState
from appliance.hub.metadata import Roles, first_roles, load_roles
from appliance.hub.repository import Repository
from appliance.hub.signing_rules import Due, due, is_driven_up, state
from appliance.security.metadata import LARGEST_ROOT_BYTES, Target
from appliance.security.signing import SigningKey, list_keys, load_keys, make_key, store_key
from appliance.store.files import open_regular, storage_errors, sync_folder, write_durably

logger = logging.getLogger(__name__)

__all__ = ["ROOT_PLAN", "TARGETS_PLAN", "Authority", "KeyPlan", "RoleState"]

OFFLINE = ("root", "targets")
ONLINE = ("snapshot", "timestamp")
DIRECTOR = "director"
ANCHOR = "root.json"
"""Beside the offline keys: the newest root, by which their holder knows his repository again."""


class Authority:
    """Changes and signs the repository of a hub's data folder."""

    def __init__(
        self, data_folder: Path, clock: Clock, *, offline: Sequence[Path] = (), passphrase: str | None = None
    ) -> None:
        """Open nothing yet.

        Args:
            data_folder: Of the hub.
            clock: For dates of signatures.
            offline: Folders with offline keys; without any, the one that `hub init` made is looked at.
            passphrase: Of encrypted offline keys.
        """
        self.repository = Repository(data_folder / "repository")
        self.online_folder = data_folder / "keys"
        self.offline_folders = tuple(offline) or (data_folder / "offline-keys",)
        self._clock = clock
        self._passphrase = passphrase

    def create(self, root: KeyPlan = ROOT_PLAN, targets: KeyPlan = TARGETS_PLAN) -> None:
        """Make all keys and the first, empty repository.

        Raises:
            ConflictError: There is one.
        """
        with self.repository.changing():
            if self.repository.exists:
                raise ConflictError(f"There is a signed repository in {self.repository.folder}; nothing was changed.")
            plans = {"root": root, "targets": targets, **dict.fromkeys((*ONLINE, DIRECTOR), KeyPlan(1, 1))}
            keys = {role: [self.new_key(role) for _ in range(plan.keys)] for role, plan in plans.items()}
            director = tuple(each.public.value for each in keys.pop(DIRECTOR))
            roles = first_roles(
                {role: [each.public for each in found] for role, found in keys.items()},
                {role: plans[role].threshold for role in keys},
            )
            now = self._clock.unix()
            roles.sign_root(now, keys["root"][: root.threshold])
            files = self._set_targets(roles, {DIRECTOR_TARGET: msgspec.json.encode(DirectorKeys(director))})
            roles.sign_targets(now, keys["targets"][: targets.threshold])
            roles.sign_snapshot(now, keys["snapshot"])
            roles.sign_timestamp(now, keys["timestamp"])
            self.repository.publish(roles.written, files)
            self._leave_root()

    def roles(self) -> Roles:
        """Return the roles as they are signed now.

        Raises:
            NotFoundError: There is no repository.
            StorageError: It is damaged.
        """
        return load_roles(self.repository.metadata())

    def root(self) -> bytes:
        """Return the newest root metadata, which a new device is given as its anchor."""
        files = self.repository.metadata()
        return files[max((name for name in files if name.endswith(".root.json")), key=lambda name: int(name[:-10]))]

    def targets(self) -> dict[str, Target]:
        """Return every signed file by its path."""
        return self.roles().target_files()

    def read_target(self, target: Target) -> bytes:
        """Return the content of a signed file, unchecked."""
        path = self.repository.folder / target.stored
        with storage_errors(path), open_regular(path) as file:
            return file.read(target.length + 1)

    def require_targets_keys(self) -> None:
        """Check, before any long work, that the keys are at hand with which targets are signed.

        Raises:
            NotFoundError: They are not.
            UntrustedError: Someone else changed the repository.
        """
        self._signers(self._checked_roles(), "targets")

    def change_targets(
        self, added: Mapping[str, bytes], removed: Iterable[str] = (), counters: Mapping[str, int] | None = None
    ) -> None:
        """Sign and publish a change of the signed files; needs the targets keys.

        Args:
            added: New content by path.
            removed: Paths that are no longer signed; their files go too.
            counters: Newest release counter of models, where it changes.

        Raises:
            NotFoundError: The keys are not at hand.
            UntrustedError: Someone else changed the repository.
            ConflictError: A part of a release is signed already with another content.
        """
        with self.repository.changing():
            roles = self._checked_roles()
            keys = self._signers(roles, "targets")
            _refuse_second(added, roles)
            for path in removed:
                roles.targets.signed.targets.pop(path, None)
            files = self._set_targets(roles, added)
            roles.set_counters({**roles.counters(), **(counters or {})})
            self._sign_and_publish(roles, targets=keys, files=files)
            self.repository.remove_unsigned(frozenset(each.stored for each in roles.target_files().values()))

    def sign_again(self, role: str) -> None:
        """Sign a role again before it expires, and what hangs on it; root and targets need their offline keys.

        But for the root, the versions jump to the Unix seconds: so a hub that was restored from a backup is believed
        by devices that have seen newer versions of it.

        Raises:
            NotFoundError: The keys are not at hand.
            UntrustedError: Someone else changed the repository.
        """
        with self.repository.changing():
            if role == "root":
                roles = self._checked_roles()
                roles.sign_root(self._clock.unix(), self._signers(roles, "root"))
                self.repository.publish(roles.written, {})
                self._leave_root()
            elif role == "targets":
                roles = self._checked_roles()
                self._sign_and_publish(roles, targets=self._signers(roles, "targets"), jump=True)
            else:
                self._sign_and_publish(self.roles(), jump=True)

    def sign_when_due(self) -> dict[str, Due]:
        """Sign snapshot and timestamp again if it is time, and return how each stood; the hub calls this every hour.

        Raises:
            NotFoundError: There is no repository, or an online key is missing.
        """
        now = self._clock.unix()
        with self.repository.changing():
            roles = self.roles()
            standing = {role: due(role, now, roles.issued(role)) for role in ONLINE}
            wrong = next((each for each in standing.values() if each.startswith("clock")), None)
            if wrong:
                logger.error(
                    "The signed repository is not signed again: the hub's clock says %s, the last signature %s. "
                    "Correct the clock, then: appliance hub keys sign",
                    iso_timestamp(now),
                    iso_timestamp(roles.issued("timestamp")),
                )
            elif standing["snapshot"] == "yes":
                self._sign_and_publish(roles)
            elif standing["timestamp"] == "yes":
                roles.sign_timestamp(now, self._signers(roles, "timestamp"))
                self.repository.publish(roles.written, {})
        return standing

    def change_keys(
        self, role: str, *, add: int = 0, remove: Sequence[str] = (), threshold: int | None = None
    ) -> list[str]:
        """Give root or targets other keys in a new root; needs the root keys, and a threshold of the new targets keys.

        Args:
            role: `root` or `targets`.
            add: How many new keys are made, in the first folder of offline keys.
            remove: Ids of keys that count no more, or their beginning.
            threshold: How many have to sign from now on; None leaves it.

        Returns:
            The ids of the new keys.

        Raises:
            NotFoundError: Keys that have to sign are not at hand.
            InvalidRequestError: Too few keys would be left.
            UntrustedError: Someone else changed the repository.
        """
        with self.repository.changing():
            roles = self._checked_roles()
            old_root = self._signers(roles, "root")
            before = roles.key_ids(role)
            leaving = [key for key in before if any(key.startswith(each) for each in remove)]
            plan = KeyPlan(len(before) - len(leaving) + add, threshold or roles.threshold(role))
            made = [self.new_key(role) for _ in range(add)]
            roles.replace_keys(role, leaving, [each.public for each in made], plan.threshold)
            restart = role == "targets" and len(leaving) == len(before) and is_driven_up(roles.version("targets"))
            left = self._renew_online(roles)[0] if restart else set()
            signers = {each.id: each for each in (*old_root, *self._signers(roles, "root"))}
            roles.sign_root(self._clock.unix(), list(signers.values()))
            targets = self._signers(roles, "targets") if role == "targets" else None
            self._sign_and_publish(roles, targets=targets, restart={"targets", *ONLINE} if restart else set())
            self._leave_root()
        self._forget_online(left)
        return [each.id for each in made]

    def rotate_online(self) -> list[str]:
        """Replace the keys that lie on the hub, after it was taken over or from time to time; needs root and targets.

        Snapshot and timestamp change in one root. Devices begin to count both anew, so that versions which an intruder
        has driven up are left behind, and nothing that he signed counts any more.

        Returns:
            The ids of the new keys.

        Raises:
            NotFoundError: Keys that have to sign are not at hand.
            UntrustedError: Root or targets are not what was signed.
        """
        with self.repository.changing():
            roles = self._checked_roles()
            root = self._signers(roles, "root")
            targets = self._signers(roles, "targets")
            left, made = self._renew_online(roles)
            left |= {each.id_start for each in list_keys([self.online_folder], DIRECTOR)}
            roles.sign_root(self._clock.unix(), root)
            made.append(self.new_key(DIRECTOR))
            director = DirectorKeys((made[-1].public.value,))
            files = self._set_targets(roles, {DIRECTOR_TARGET: msgspec.json.encode(director)})
            self._sign_and_publish(roles, targets=targets, files=files, restart=set(ONLINE))
            self._leave_root()
        self._forget_online(left)
        return [each.id for each in made]

    def find_keys(self, role: str, starts: Sequence[str]) -> list[str]:
        """Return the ids of a role's keys that begin so, or of all if nothing is given.

        Raises:
            NotFoundError: The role has no such key.
        """
        ids = self.roles().key_ids(role)
        for start in starts:
            if not start or not any(each.startswith(start) for each in ids):
                raise NotFoundError(f"The role {role} has no key {start!r:.80}; it has {', '.join(ids)}.")
        return [each for each in ids if not starts or any(each.startswith(start) for start in starts)]

    def states(self) -> list[RoleState]:
        """Return how each role stands."""
        roles = self.roles()
        now = self._clock.unix()
        found = []
        for role in (*OFFLINE, *ONLINE):
            ids = roles.key_ids(role)
            expires = roles.expires(role)
            found.append(
                RoleState(
                    role,
                    "offline" if role in OFFLINE else "online",
                    roles.threshold(role),
                    tuple(ids),
                    self._at_hand(role, ids),
                    roles.version(role),
                    expires,
                    state(role, now, expires),
                )
            )
        return found

    def _folders(self, role: str) -> tuple[Path, ...]:
        return self.offline_folders if role in OFFLINE else (self.online_folder,)

    def new_key(self, role: str) -> SigningKey:
        """Make a key and store it where its role's keys are; it counts once it is signed for."""
        key = make_key()
        passphrase = self._passphrase if role in OFFLINE else None
        store_key(key, self._folders(role)[0], role, passphrase=passphrase)
        return key

    def _signers(self, roles: Roles, role: str) -> list[SigningKey]:
        passphrase = self._passphrase if role in OFFLINE else None
        return load_keys(self._folders(role), role, roles.key_ids(role), roles.threshold(role), passphrase=passphrase)

    def _at_hand(self, role: str, ids: Iterable[str]) -> tuple[str, ...]:
        starts = {each.id_start for each in list_keys(self._folders(role), role)}
        return tuple(each for each in ids if each[:16] in starts)

    @staticmethod
    def _set_targets(roles: Roles, added: Mapping[str, bytes]) -> dict[str, bytes]:
        return {roles.set_target(path, data).stored: data for path, data in added.items()}

    def _checked_roles(self) -> Roles:
        """Return the roles if they follow from the root that lies with the offline keys."""
        anchors = [folder / ANCHOR for folder in self.offline_folders if (folder / ANCHOR).is_file()]
        if not anchors:
            raise NotFoundError(
                f"There is no {ANCHOR} in {', '.join(map(str, self.offline_folders))}, so nobody could tell whether "
                "someone changed this hub's repository.",
                advice="Name the folder with the offline keys with --keys; the file belongs beside them.",
                code="keys_missing",
            )
        files = self.repository.metadata()
        roles = load_roles(files)
        for path in anchors:
            with storage_errors(path), open_regular(path) as file:
                roles.check_against(file.read(LARGEST_ROOT_BYTES), files)
        return roles

    def _leave_root(self) -> None:
        """Put the newest root beside the offline keys, for the next time."""
        root = self.root()
        for folder in self.offline_folders:
            if folder.is_dir():
                write_durably(folder / ANCHOR, root)

    def _renew_online(self, roles: Roles) -> tuple[set[str], list[SigningKey]]:
        """Replace the keys of snapshot and timestamp; return the beginnings of the old ones' ids, and the new keys."""
        old: set[str] = set()
        new = []
        for role in ONLINE:
            ids = roles.key_ids(role)
            new.append(self.new_key(role))
            roles.replace_keys(role, ids, [new[-1].public], 1)
            old.update(each[:16] for each in ids)
        return old, new

    def _sign_and_publish(
        self,
        roles: Roles,
        *,
        targets: Sequence[SigningKey] | None = None,
        files: Mapping[str, bytes] | None = None,
        restart: Container[str] = (),
        jump: bool = False,
    ) -> None:
        now = self._clock.unix()
        least = int(now) if jump else 0
        if targets is not None:
            roles.sign_targets(now, targets, restart="targets" in restart, at_least=least)
        roles.sign_snapshot(now, self._signers(roles, "snapshot"), restart="snapshot" in restart, at_least=least)
        roles.sign_timestamp(now, self._signers(roles, "timestamp"), restart="timestamp" in restart, at_least=least)
        self.repository.publish(roles.written, files or {})

    def _forget_online(self, starts: set[str]) -> None:
        with storage_errors(self.online_folder):
            for stored in list_keys([self.online_folder]):
                if stored.id_start in starts:
                    stored.path.unlink()
            sync_folder(self.online_folder)


def _refuse_second(added: Mapping[str, bytes], roles: Roles) -> None:
    """A release is signed once: of two people who release the same model at once, one is told to try again."""
    for path, data in added.items():
        there = roles.target_files().get(path)
        if path != DIRECTOR_TARGET and there is not None and there != Target.of(path, data):
            raise ConflictError(f"Someone else has just signed {path}; nothing was changed.", advice="Try again.")
