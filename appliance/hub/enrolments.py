"""Claims, requests for an identity, and certificates, as the hub keeps them.

A verdict, the certificate it leads to and the use it costs are one transaction: whoever is killed in between has signed
nothing that counts, and the box, which asks again, gets the same certificate.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence

import msgspec

from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError
from appliance.hub.enrolment_policy import Approval, ClaimFacts, EnrolmentState, Known, judge
from appliance.hub.enrolment_records import (
    Asked,
    Barred,
    CertificateRecord,
    ClaimRecord,
    EnrolmentRecord,
    Outcome,
    Signed,
)
from appliance.security.audit import record
from appliance.store.database import Connection, Database, Row


class SqliteEnrolments:
    """`Enrolments` in `hub.db`, and what the command line does to it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def answer(self, asked: Asked, sign: Callable[[], Signed], *, approval: Approval, now: float) -> Outcome:
        """Judge a request, and sign and keep what comes of it, in one transaction."""
        return await self._database.write(lambda connection: _answer(connection, asked, sign, approval, now))

    async def renew(self, device: str, key_digest: str, sign: Callable[[], Signed], *, now: float) -> Outcome:
        """Sign another certificate for a device whose own is valid; the same key gets the same one again."""
        return await self._database.write(lambda connection: _renew(connection, device, key_digest, sign, now))

    def make_claim(
        self, *, allowed: int, expires: float, automatic: bool, actor: str, now: float
    ) -> tuple[ClaimRecord, str]:
        """Make a claim and return it with its token, which cannot be had again.

        Raises:
            InvalidRequestError: It would enrol nobody.
        """
        if allowed < 1 or expires <= now:
            raise InvalidRequestError("Such a claim would enrol nobody.", advice="Give it uses and days.")
        secret = secrets.token_urlsafe(32)
        claim = ClaimRecord(f"claim_{secrets.token_hex(6)}", now, expires, allowed, 0, automatic, None)

        def insert(connection: Connection) -> None:
            connection.execute(
                "INSERT INTO claims (id, secret_hash, created, expires, allowed, automatic) VALUES (?, ?, ?, ?, ?, ?)",
                (claim.id, _hash(secret), now, expires, allowed, int(automatic)),
            )
            detail = {"uses": allowed, "expires": expires, "automatic": automatic}
            record(connection, actor, "claim.create", claim.id, detail, at=now)

        self._database.write_blocking(insert)
        return claim, secret

    def revoke_claim(self, claim: str, *, actor: str, now: float) -> None:
        """Let a claim enrol nobody any more; one that is revoked stays so.

        Raises:
            NotFoundError: There is none of that id.
        """

        def update(connection: Connection) -> None:
            if connection.execute("SELECT 1 FROM claims WHERE id = ?", (claim,)).fetchone() is None:
                raise NotFoundError(f"There is no claim {claim!r}.", advice="appliance hub ca list shows them.")
            sql = "UPDATE claims SET revoked = ? WHERE id = ? AND revoked IS NULL"
            if connection.execute(sql, (now, claim)).rowcount:
                record(connection, actor, "claim.revoke", claim, at=now)

        self._database.write_blocking(update)

    def claims(self) -> Sequence[ClaimRecord]:
        """Return all claims, oldest first."""
        return self._database.read(
            lambda connection: [_claim(row) for row in connection.execute(f"{_CLAIMS} ORDER BY created, id")]
        )

    def enrolments(self, *states: EnrolmentState) -> Sequence[EnrolmentRecord]:
        """Return the requests in these states, or in any, oldest first."""
        wanted = msgspec.json.encode(states).decode()
        sql = "SELECT * FROM enrolments WHERE ? = '[]' OR state IN (SELECT value FROM json_each(?)) ORDER BY id"
        return self._database.read(
            lambda connection: [_enrolment(row) for row in connection.execute(sql, (wanted, wanted))]
        )

    def certificates(self, device: str | None = None) -> Sequence[CertificateRecord]:
        """Return the certificates of a device, or of all, oldest first."""
        sql = "SELECT * FROM certificates WHERE ? IS NULL OR device = ? ORDER BY issued, serial"
        return self._database.read(
            lambda connection: [_certificate(row) for row in connection.execute(sql, (device, device))]
        )

    def approve(self, device: str, *, actor: str, now: float, replace: bool = False) -> None:
        """Let the box that waits for this id have it.

        Args:
            device: The id.
            actor: For the audit.
            now: Unix seconds.
            replace: Let it be another installation than the one that has the id now, which loses it.

        Raises:
            NotFoundError: No box waits for it.
            ConflictError: Several do, or it would replace another.
        """
        self._database.write_blocking(lambda connection: _approve(connection, device, actor, now, replace=replace))

    def refuse(self, device: str, *, actor: str, now: float) -> None:
        """Refuse every box that waits for this id.

        Raises:
            NotFoundError: No box waits for it.
        """

        def update(connection: Connection) -> None:
            _waiting(connection, device)
            connection.execute(
                "UPDATE enrolments SET state = 'refused', decided = ?, decided_by = ? WHERE device = ? "
                "AND state IN ('waiting', 'quarantined', 'approved')",
                (now, actor, device),
            )
            record(connection, actor, "device.refuse", device, at=now)

        self._database.write_blocking(update)

    def revoke(self, device: str, *, actor: str, now: float, reason: str = "") -> Sequence[str]:
        """Revoke every certificate of a device; return the serials of those that were valid.

        Raises:
            NotFoundError: It never had one.
        """

        def update(connection: Connection) -> Sequence[str]:
            if connection.execute("SELECT 1 FROM certificates WHERE device = ?", (device,)).fetchone() is None:
                raise NotFoundError(
                    f"No certificate was ever signed for {device!r}.", advice="appliance hub ca list shows them."
                )
            serials = _revoke(connection, device, now, reason or "revoked by an operator")
            connection.execute(
                "UPDATE enrolments SET state = 'revoked', decided = ?, decided_by = ? WHERE device = ? "
                "AND state = 'issued'",
                (now, actor, device),
            )
            if serials:
                record(connection, actor, "device.revoke", device, {"serials": serials, "reason": reason}, at=now)
            return serials

        return self._database.write_blocking(update)

    def revoked(self, *, now: float) -> Sequence[CertificateRecord]:
        """Return the revoked certificates that have not expired: what the revocation list has to name."""
        sql = "SELECT * FROM certificates WHERE revoked IS NOT NULL AND expires > ? ORDER BY revoked, serial"
        return self._database.read(lambda connection: [_certificate(row) for row in connection.execute(sql, (now,))])

    def counts(self, serial: str, *, now: float) -> bool:
        """Return whether a certificate is a device's, was not revoked and has not expired."""
        sql = "SELECT 1 FROM certificates WHERE serial = ? AND revoked IS NULL AND expires > ?"
        return self._database.read(lambda connection: connection.execute(sql, (serial, now)).fetchone() is not None)

    def barred(self, *, now: float) -> Sequence[Barred]:
        """Return the devices that had a certificate and have none any more that is not revoked, by their ids."""
        sql = """
            SELECT c.device, max(c.revoked) AS revoked, coalesce(d.seen, 0.0) AS seen
            FROM certificates AS c LEFT JOIN devices AS d ON d.id = c.device
            WHERE c.expires > ? GROUP BY c.device HAVING count(*) = count(c.revoked) ORDER BY c.device
        """
        return self._database.read(
            lambda connection: [
                Barred(row["device"], row["revoked"], row["seen"]) for row in connection.execute(sql, (now,))
            ]
        )


_CLAIMS = """
    SELECT *,
        (SELECT count(*) FROM enrolments WHERE claim = claims.id AND state IN ('issued', 'revoked')) AS used,
        (SELECT count(*) FROM enrolments WHERE claim = claims.id AND state IN ('waiting', 'quarantined')) AS waiting
    FROM claims
"""


def _answer(
    connection: Connection, asked: Asked, sign: Callable[[], Signed], approval: Approval, now: float
) -> Outcome:
    row = connection.execute(
        "SELECT * FROM enrolments WHERE device = ? AND instance = ? AND key_digest = ?",
        (asked.device, asked.instance, asked.key_digest),
    ).fetchone()
    claim = _claim_of(connection, asked.token)
    known = _known(connection, asked, None if row is None else row["state"], now)
    facts = None if claim is None else _claim_facts(claim)
    verdict = judge(facts, known, asked.instance, approval=approval, now=now)
    if claim is None or verdict.state is None:
        return Outcome(None, detail=verdict.detail)
    if verdict.sign:
        _issue(connection, asked, claim["id"], sign(), now)
    _keep(connection, asked, claim["id"], verdict.state, now)
    if row is None and verdict.state == "quarantined":
        record(connection, claim["id"], "device.quarantine", asked.device, {"instance": asked.instance}, at=now)
    if verdict.state == "issued":
        return Outcome("issued", _chain(connection, asked.device, asked.key_digest, now))
    return Outcome(verdict.state, detail=verdict.detail)


def _known(connection: Connection, asked: Asked, state: EnrolmentState | None, now: float) -> Known:
    if state == "issued" and not _chain(connection, asked.device, asked.key_digest, now):
        state = None  # its certificate ran out: it asks anew
    of_device = {
        row["state"]: row["instance"]
        for row in connection.execute(
            "SELECT state, instance FROM enrolments WHERE device = ? AND state IN ('issued', 'revoked')",
            (asked.device,),
        )
    }
    return Known(state, of_device.get("issued"), barred="revoked" in of_device)


def _issue(connection: Connection, asked: Asked, claim: str, signed: Signed, now: float) -> None:
    """Sign a box in; whoever had the id before, by an operator's leave, has it no more."""
    _revoke(connection, asked.device, now, "replaced")
    connection.execute(
        "UPDATE enrolments SET state = 'revoked', decided = ? WHERE device = ? AND state = 'issued'",
        (now, asked.device),
    )
    _keep_certificate(connection, asked.device, asked.key_digest, signed, now)
    detail = {"claim": claim, "instance": asked.instance, "serial": signed.serial}
    record(connection, claim, "device.enrol", asked.device, detail, at=now)


def _keep(connection: Connection, asked: Asked, claim: str, state: EnrolmentState, now: float) -> None:
    connection.execute(
        """
        INSERT INTO enrolments (device, instance, key_digest, claim, state, facts, asked, asked_last)
        VALUES (:device, :instance, :key_digest, :claim, :state, :facts, :now, :now)
        ON CONFLICT (device, instance, key_digest) DO UPDATE SET state = :state, asked_last = :now
        """,
        {
            "device": asked.device,
            "instance": asked.instance,
            "key_digest": asked.key_digest,
            "claim": claim,
            "state": state,
            "facts": msgspec.json.encode(asked.facts).decode(),
            "now": now,
        },
    )


def _renew(connection: Connection, device: str, key_digest: str, sign: Callable[[], Signed], now: float) -> Outcome:
    sql = "SELECT 1 FROM certificates WHERE device = ? AND revoked IS NULL AND expires > ?"
    if connection.execute(sql, (device, now)).fetchone() is None:
        return Outcome(None, detail="This device has no valid certificate; it has to be enrolled anew.")
    if not (chain := _chain(connection, device, key_digest, now)):
        signed = sign()
        _keep_certificate(connection, device, key_digest, signed, now)
        record(connection, f"device:{device}", "device.renew", device, {"serial": signed.serial}, at=now)
        chain = signed.chain
    return Outcome("issued", chain)


def _approve(connection: Connection, device: str, actor: str, now: float, *, replace: bool) -> None:
    rows = _waiting(connection, device)
    if len(rows) > 1:
        raise ConflictError(
            f"{len(rows)} boxes want to be {device!r}.", advice="Refuse them, and let the right one ask again."
        )
    if rows[0]["state"] == "quarantined" and not replace:
        raise ConflictError(
            f"Another installation is {device!r} already.",
            advice="If the box was set up anew, approve with --replace; the certificate of the other is revoked then.",
        )
    connection.execute(
        "UPDATE enrolments SET state = 'approved', decided = ?, decided_by = ? WHERE id = ?",
        (now, actor, rows[0]["id"]),
    )
    record(connection, actor, "device.approve", device, {"instance": rows[0]["instance"], "replace": replace}, at=now)


def _waiting(connection: Connection, device: str) -> list[Row]:
    rows = connection.execute(
        "SELECT * FROM enrolments WHERE device = ? AND state IN ('waiting', 'quarantined') ORDER BY id", (device,)
    ).fetchall()
    if not rows:
        raise NotFoundError(
            f"No box waits to become {device!r}.", advice="appliance hub devices waiting shows who waits."
        )
    return rows


def _revoke(connection: Connection, device: str, now: float, reason: str) -> list[str]:
    rows = connection.execute(
        "UPDATE certificates SET revoked = ?, reason = ? WHERE device = ? AND revoked IS NULL AND expires > ? "
        "RETURNING serial",
        (now, reason, device, now),
    )
    return sorted(row["serial"] for row in rows)


def _keep_certificate(connection: Connection, device: str, key_digest: str, signed: Signed, now: float) -> None:
    connection.execute(
        "INSERT INTO certificates (serial, device, key_digest, issued, expires, chain) VALUES (?, ?, ?, ?, ?, ?)",
        (signed.serial, device, key_digest, now, signed.expires, signed.chain),
    )


def _chain(connection: Connection, device: str, key_digest: str, now: float) -> str:
    row = connection.execute(
        "SELECT chain FROM certificates WHERE device = ? AND key_digest = ? AND revoked IS NULL AND expires > ? "
        "ORDER BY issued DESC LIMIT 1",
        (device, key_digest, now),
    ).fetchone()
    return "" if row is None else str(row["chain"])


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def _claim_of(connection: Connection, token: str) -> Row | None:
    row: Row | None = connection.execute(f"{_CLAIMS} WHERE secret_hash = ?", (_hash(token),)).fetchone()
    return row


def _claim_facts(row: Row) -> ClaimFacts:
    return ClaimFacts(
        expires=row["expires"],
        revoked=row["revoked"] is not None,
        allowed=row["allowed"],
        used=row["used"],
        waiting=row["waiting"],
        automatic=bool(row["automatic"]),
    )


def _claim(row: Row) -> ClaimRecord:
    return ClaimRecord(
        row["id"],
        row["created"],
        row["expires"],
        row["allowed"],
        row["used"],
        bool(row["automatic"]),
        row["revoked"],
    )


def _enrolment(row: Row) -> EnrolmentRecord:
    return EnrolmentRecord(
        row["id"],
        row["device"],
        row["instance"],
        row["claim"],
        row["state"],
        msgspec.json.decode(row["facts"]),
        row["asked"],
        row["asked_last"],
        row["decided_by"],
    )


def _certificate(row: Row) -> CertificateRecord:
    return CertificateRecord(row["serial"], row["device"], row["issued"], row["expires"], row["revoked"], row["reason"])
