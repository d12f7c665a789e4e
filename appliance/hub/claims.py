"""Makes claim bundles: the one file that is carried to a new box."""

from __future__ import annotations

from pathlib import Path

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError
from appliance.core.fleet import ClaimBundle
from appliance.core.hub_settings import HubSettings
from appliance.hub.authority import Authority as ReleaseAuthority
from appliance.hub.enrolment_records import ClaimRecord
from appliance.hub.enrolments import SqliteEnrolments
from appliance.hub.init import load_authority, read_hub
from appliance.security.certificates import CLAIM_NAME
from appliance.store.private_files import write_file

_DAY_S = 86_400.0


def make_bundle(
    settings: HubSettings,
    enrolments: SqliteEnrolments,
    *,
    uses: int,
    days: float,
    automatic: bool,
    actor: str,
    clock: Clock,
) -> tuple[ClaimRecord, ClaimBundle]:
    """Make a claim and its bundle, which cannot be had again.

    Raises:
        NotFoundError: There is no hub in the folder, or it is not complete.
        InvalidRequestError: It would enrol nobody.
    """
    hub, authority = read_hub(settings), load_authority(settings)
    root = ReleaseAuthority(settings.data_dir, clock).root()
    now = clock.unix()
    expires = now + days * _DAY_S
    certificate = authority.client(CLAIM_NAME, now, lifetime_s=days * _DAY_S)
    record, token = enrolments.make_claim(allowed=uses, expires=expires, automatic=automatic, actor=actor, now=now)
    bundle = ClaimBundle(
        token=token,
        credentials=(certificate.key + certificate.certificate).decode(),
        authority=authority.identity.certificate.decode(),
        host=hub.name,
        port=hub.port,
        root=root.decode(),
        expires=expires,
    )
    return record, bundle


def write_bundle(path: Path, bundle: ClaimBundle) -> None:
    """Write a bundle to a file that is not there yet.

    Raises:
        ConflictError: There is such a file.
        StorageError: It cannot be written.
    """
    if path.exists():
        raise ConflictError(f"There is a file {path} already; nothing was changed.", advice="Name another one.")
    write_file(path, msgspec.json.encode(bundle))
