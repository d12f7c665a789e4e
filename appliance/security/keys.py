"""API keys: made here, shown once, kept only as hashes, checked on every request.

A secret is 256 random bits, so a plain SHA-256 of it is as strong as the secret: a slow password hash defends what can
be guessed, and nothing here can. Looking the hash up in an index is not timing-sensitive either: what the time might
tell is about the hash of a guess, and a guess cannot be steered towards a wanted hash.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError
from appliance.core.types import Priority
from appliance.security.audit import local_actor, record
from appliance.store.database import Connection, Database, Row

logger = logging.getLogger(__name__)

SCOPES: Sequence[str] = ("inference", "metrics", "admin")
"""`inference` may use models, `metrics` may read `/metrics`, `admin` may do everything."""

TIERS = {tier.name.lower(): tier for tier in Priority}
"""The service tiers by the names that OpenAI gives them, best first."""

SMALLEST_WEIGHT, LARGEST_WEIGHT = 0.01, 100.0

KEY_PREFIX = "ea-"
"""So that people and secret scanners recognise one."""

_SECRET_BYTES = 32
_SECRET_LENGTH = len(KEY_PREFIX) + 43
"""43 characters of URL-safe base64 hold 32 bytes."""

_NAME_LENGTH = 64
_LAST_USED_PRECISION_S = 60.0
"""Last use is noted this often, so that a busy key costs one write a minute and not one a request."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key as it may be shown; its secret is not known here.

    Attributes:
        id: Such as `key_1a2b3c4d5e6f`; may appear in logs.
        scopes: Of `SCOPES`.
        created: Seconds since 1970, as are the others.
        last_used: To about a minute; None if never.
        revoked: When it was revoked; None while it is valid.
        weight: Its share of a busy engine, relative to the other keys'.
        highest_tier: The best service tier that it is served in, whatever it asks for.
    """

    id: str
    name: str
    scopes: frozenset[str]
    created: float
    last_used: float | None
    revoked: float | None
    weight: float = 1.0
    highest_tier: Priority = Priority.DEFAULT

    def allows(self, scope: str) -> bool:
        """Return whether the key may do what needs the scope; `admin` implies every other."""
        return scope in self.scopes or "admin" in self.scopes

    @property
    def tier_name(self) -> str:
        """Return the name of the highest tier, as OpenAI writes it."""
        return self.highest_tier.name.lower()


class KeyStore:
    """The API keys in the database.

    Every question goes to the database, so a key that the command line revoked stops working with the next request.
    """

    def __init__(self, database: Database, clock: Clock, *, scopes: Sequence[str] = SCOPES) -> None:
        """Use the keys of a database; `scopes` are those that a key of its program may have."""
        self._scopes = scopes
        self._database = database
        self._clock = clock
        self._noted: dict[str, float] = {}

    def create(
        self,
        name: str,
        scopes: Iterable[str],
        *,
        weight: float = 1.0,
        highest_tier: Priority = Priority.DEFAULT,
        actor: str | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key and return it with its secret, which cannot be had again.

        Args:
            name: What the key is for, up to 64 visible characters; distinct among valid keys.
            scopes: At least one of `SCOPES`.
            weight: Its share of a busy engine, relative to the other keys', 0.01 to 100.
            highest_tier: The best service tier that it is served in.
            actor: For the audit; None is the user of this process.

        Raises:
            InvalidRequestError: The name, a scope or the weight will not do.
            ConflictError: A valid key has the name.
        """
        name = _checked_name(name)
        granted = _checked_scopes(scopes, self._scopes)
        _check_weight(weight)
        secret = KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        key = ApiKey(
            f"key_{secrets.token_hex(6)}",
            name,
            granted,
            self._clock.unix(),
            last_used=None,
            revoked=None,
            weight=weight,
            highest_tier=highest_tier,
        )
        by = actor or local_actor()

        def insert(connection: Connection) -> None:
            if connection.execute("SELECT 1 FROM api_keys WHERE name = ? AND revoked IS NULL", (name,)).fetchone():
                raise ConflictError(
                    f"There is already a valid API key named {name!r}.",
                    advice="Choose another name, or revoke that key first.",
                    param="name",
                )
            connection.execute(
                "INSERT INTO api_keys (id, name, token_hash, scopes, created, weight, highest_tier) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (key.id, name, _hash(secret), " ".join(sorted(granted)), key.created, weight, key.tier_name),
            )
            detail = {"name": name, "scopes": sorted(granted), "weight": weight, "highest_tier": key.tier_name}
            record(connection, by, "key.create", key.id, detail, at=key.created)

        self._database.write_blocking(insert)
        return key, secret

    def list(self) -> tuple[ApiKey, ...]:
        """Return all keys, revoked ones too, oldest first."""
        return self._database.read(
            lambda connection: tuple(_key(row) for row in connection.execute(f"{_SELECT} ORDER BY created, id"))
        )

    def revoke(self, key_id: str, *, actor: str | None = None) -> ApiKey:
        """Make the key useless from the next request on; one that is revoked already stays as it is.

        Raises:
            NotFoundError: There is no such id.
        """
        now = self._clock.unix()
        by = actor or local_actor()

        def update(connection: Connection) -> ApiKey:
            changed = connection.execute(
                "UPDATE api_keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (now, key_id)
            ).rowcount
            row = connection.execute(f"{_SELECT} WHERE id = ?", (key_id,)).fetchone()
            if row is None:
                raise _no_such_key(connection, key_id)
            if changed:
                record(connection, by, "key.revoke", key_id, {"name": row["name"]}, at=now)
            return _key(row)

        return self._database.write_blocking(update)

    def authenticate(self, token: str) -> ApiKey | None:
        """Return the valid key with this secret, or None. Takes microseconds; safe on the event loop."""
        if len(token) != _SECRET_LENGTH or not token.isascii():
            return None
        token_hash = _hash(token)
        row = self._database.read(
            lambda connection: connection.execute(
                f"{_SELECT} WHERE token_hash = ? AND revoked IS NULL", (token_hash,)
            ).fetchone()
        )
        if row is None:
            return None
        key = _key(row)
        self._note_use(key)
        return key

    def find(self, key_id: str) -> ApiKey | None:
        """Return the valid key with this id, or None."""
        row = self._database.read(
            lambda connection: connection.execute(f"{_SELECT} WHERE id = ? AND revoked IS NULL", (key_id,)).fetchone()
        )
        return None if row is None else _key(row)

    def has_keys(self) -> bool:
        """Return whether any key is valid."""
        return self._database.read(
            lambda connection: connection.execute("SELECT 1 FROM api_keys WHERE revoked IS NULL").fetchone() is not None
        )

    def _note_use(self, key: ApiKey) -> None:
        now = self._clock.unix()
        noted = self._noted.get(key.id, key.last_used)
        if noted is not None and abs(now - noted) < _LAST_USED_PRECISION_S:  # abs: the wall clock may jump back
            return
        self._noted[key.id] = now
        future = self._database.submit(
            lambda connection: (
                connection.execute("UPDATE api_keys SET last_used = ? WHERE id = ?", (now, key.id)).rowcount
            )
        )
        future.add_done_callback(_log_failure)


_SELECT = "SELECT id, name, scopes, created, last_used, revoked, weight, highest_tier FROM api_keys"


def _key(row: Row) -> ApiKey:
    scopes = frozenset(row["scopes"].split())
    return ApiKey(
        row["id"],
        row["name"],
        scopes,
        row["created"],
        row["last_used"],
        row["revoked"],
        row["weight"],
        TIERS[row["highest_tier"]],
    )


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


def _checked_name(name: str) -> str:
    name = unicodedata.normalize("NFC", name)
    if not 1 <= len(name) <= _NAME_LENGTH or not name.isprintable() or name != name.strip():
        raise InvalidRequestError(
            f"{name[: _NAME_LENGTH + 1]!r} will not do as the name of an API key.",
            advice=f"Use 1 to {_NAME_LENGTH} visible characters that say what the key is for, such as 'line 3 camera'.",
            param="name",
        )
    return name


def _checked_scopes(scopes: Iterable[str], there_are: Sequence[str]) -> frozenset[str]:
    granted = frozenset(scopes)
    unknown = sorted(granted.difference(there_are))
    if unknown or not granted:
        raise InvalidRequestError(
            f"There is no scope {unknown[0]!r}." if unknown else "An API key without a scope could do nothing.",
            advice=f"The scopes are {', '.join(there_are)}.",
            param="scopes",
        )
    return granted


def _check_weight(weight: float) -> None:
    if not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:
        raise InvalidRequestError(
            f"{weight:g} will not do as the weight of an API key.",
            advice=f"Use {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}; 1 is what a key has unless told otherwise.",
            param="weight",
        )


def _no_such_key(connection: Connection, key_id: str) -> NotFoundError:
    valid = connection.execute("SELECT id FROM api_keys WHERE revoked IS NULL ORDER BY created LIMIT 20").fetchall()
    known = ", ".join(row["id"] for row in valid)
    return NotFoundError(
        f"There is no API key with the id {key_id!r}.",
        advice=f"Valid keys: {known}." if known else "There is no valid API key at all.",
        param="id",
    )


def _log_failure(future: Future[int]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None:
        logger.warning("The last use of an API key could not be noted: %s", error)
