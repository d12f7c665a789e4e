"""How enrolment is plugged into the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.core.fleet import CLAIM_REQUEST
from appliance.hub.certifier import HubAuthority
from appliance.hub.enrolment import EnrolmentPart, EnrolmentRules
from appliance.hub.enrolments import SqliteEnrolments
from appliance.hub.init import HubFiles, load_authority
from appliance.hub.revocations import Revocations

if TYPE_CHECKING:
    from appliance.hub.room import Means


def plug_enrolment(means: Means) -> EnrolmentPart:
    """Make the part that answers claims and renewals.

    Raises:
        NotFoundError: There is no certificate authority.
    """
    settings = means.settings
    authority = load_authority(settings)
    enrolments = SqliteEnrolments(means.database)
    revocations = Revocations(enrolments, authority, HubFiles.of(settings), means.clock)
    part = EnrolmentPart(
        enrolments,
        HubAuthority(authority),
        means.link,
        means.clock,
        rules=EnrolmentRules(settings.approval, settings.certificate_days),
        refresh_revocations=revocations.refresh,
        on_enrolled=means.devices.expect,
    )
    means.listening[CLAIM_REQUEST] = part.claim
    means.questions.answer_with("renew", part.renew)
    return part
