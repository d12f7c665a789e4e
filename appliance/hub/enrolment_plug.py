"""How enrolment is plugged into the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.core.fleet import CLAIM_REQUEST
from appliance.hub.certifier import HubAuthority
from appliance.hub.enrolment import EnrolmentPart, EnrolmentRules
from appliance.hub.enrolments import SqliteEnrolments
from appliance.hub.init import HubFiles, load_authority
from appliance.hub.mqtt import connection_options
from appliance.hub.revocations import Revocations
from appliance.hub.takeovers import Takeovers

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
    takeovers = Takeovers(
        lambda: enrolments.barred(now=means.clock.unix()),
        authority,
        connection_options(settings),
        means.clock,
        say_lost=means.presence.say_lost,
    )
    part = EnrolmentPart(
        enrolments,
        HubAuthority(authority),
        means.link,
        means.clock,
        rules=EnrolmentRules(settings.approval, settings.certificate_days),
        refresh_revocations=revocations.refresh,
        end_revoked=takeovers.run_once,
        on_enrolled=means.devices.expect,
    )
    means.listening[CLAIM_REQUEST] = part.claim
    means.questions.answer_with("renew", part.renew)
    return part
