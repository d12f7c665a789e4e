"""The hub's settings under the box's own: what every program of a box starts with.

Whatever is wrong with the twin, the program starts with the box's own settings: nobody far away can keep it from that.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from appliance.core.errors import ApplianceError
from appliance.core.settings import EffectiveSetting, Settings
from appliance.fleet.identity import IdentityFolder
from appliance.fleet.twin_policy import ORIGIN, overlay
from appliance.fleet.twin_store import stored_desired

LOGGER = logging.getLogger("appliance.fleet")


def with_hub_settings(settings: Settings, effective: list[EffectiveSetting]) -> tuple[Settings, list[EffectiveSetting]]:
    """Return the settings with those that the hub of this box wants and may set; their origin is `fleet`."""
    if settings.fleet == "off":
        return settings, effective
    try:
        identity = IdentityFolder(settings.fleet_dir).identity()
        desired = None if identity is None else stored_desired(settings.fleet_path)
    except ApplianceError as error:
        LOGGER.warning("the hub's settings are left out: %s", error)
        return settings, effective
    if identity is None or desired is None or desired.device != identity.device:
        return settings, effective
    effective = overlay(settings, effective, desired)
    wanted = {each.name: each.value for each in effective if each.origin == ORIGIN}
    return replace(settings, **wanted), effective
