"""What of a desired twin is done, and what is refused by name and why.

Pure: documents and settings in, a decision out. The hub may set what shapes the work of a box, never who may reach it,
what it trusts, or which of its files are read. Sources of a setting, strongest first:

    flag, environment, file     whoever stands before the box: the hub's wish is refused, naming what is in its way
    desired twin                kept in `fleet.db`, so that it holds after a restart, hub or no hub
    default

So a box can always be mended on the spot, and the hub hears that it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from appliance.core.errors import SettingsError
from appliance.core.fleet import STREAMS, Desired
from appliance.core.setting_values import BadValueError, convert
from appliance.core.settings import EffectiveSetting, Settings, check_together, setting_fields, setting_types

ORIGIN = "fleet"
"""Where the effective value of such a setting comes from."""

LOCAL_ONLY = frozenset(
    {
        "catalog_dir",
        "data_dir",
        "fleet",
        "fleet_telemetry",
        "fleet_will_delay_s",
        "host",
        "insecure",
        "log_format",
        "mcp_servers",
        "port",
        "require_api_key",
        "sql_databases",
        "tls_certificate",
        "tls_key",
        "update_dir",
    }
)
"""Settings that the hub never sets: who may reach the box, what it reads and trusts, and how it finds its hub."""

AT_ONCE = frozenset({"log_level"})
"""Settings that are in force as soon as they are accepted; the others from the next start on."""

SHORTEST_INTERVAL_S = 1.0
LONGEST_INTERVAL_S = 86_400.0
MOST_REFUSALS = 50
MOST_NAME_CHARACTERS = 100
_MODEL_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

Verdict = Literal["new", "known", "older", "changed"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done of a desired twin.

    Attributes:
        settings: Values to be in force, checked, alone and together with what is set here.
        telemetry: Seconds between rows by stream; 0 is off.
        models: The version that each name should mean; whether there is such a version is not looked at.
        refused: Names of what is not done, each with the reason.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, float] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def compare(desired: Desired, accepted: Desired | None) -> Verdict:
    """Return what a document is beside the one accepted last.

    Returns:
        `known` is the very same; `changed` has its version but other contents, which an honest hub never sends.
    """
    if accepted is None or desired.version > accepted.version:
        return "new"
    if desired.version < accepted.version:
        return "older"
    return "known" if desired == accepted else "changed"


def decide(desired: Desired, local: Settings, origins: Mapping[str, str]) -> Decision:
    """Return what to do of a desired twin.

    Args:
        desired: The document; its device and version were looked at.
        local: The settings without any of the hub's.
        origins: Of those that somebody set here: where.
    """
    decision = Decision()
    for name, value in sorted(desired.settings.items()):
        _judge_setting(decision, name, value, origins)
    _judge_together(decision, local)
    for stream, interval_s in sorted(desired.telemetry.items()):
        _judge_interval(decision, stream, interval_s)
    for name, version in sorted(desired.models.items()):
        if _MODEL_PART.fullmatch(name) and _MODEL_PART.fullmatch(version):
            decision.models[name] = version
        else:
            _refuse(decision, f"models.{name}", f"{version!r:.70} of it cannot be a model's version")
    return decision


def overlay(local: Settings, effective: list[EffectiveSetting], desired: Desired) -> list[EffectiveSetting]:
    """Return the effective settings with those that the desired twin may set, whose origin is `fleet` then."""
    origins = {each.name: each.origin for each in effective if each.origin != "default"}
    accepted = decide(desired, local, origins).settings
    return [
        EffectiveSetting(each.name, accepted[each.name], ORIGIN, each.meaning) if each.name in accepted else each
        for each in effective
    ]


def pending(decision: Decision, local: Settings, in_force: Mapping[str, Any]) -> list[str]:
    """Return the settings that will have another value after the next start, the hub's or again the box's own."""
    later = setting_fields().keys() - LOCAL_ONLY - AT_ONCE
    return sorted(each for each in later if decision.settings.get(each, getattr(local, each)) != in_force[each])


def _judge_setting(decision: Decision, name: str, value: Any, origins: Mapping[str, str]) -> None:
    if name not in setting_fields():
        _refuse(decision, name, "this version has no such setting")
    elif name in LOCAL_ONLY:
        _refuse(decision, name, "it is set on the box itself only")
    elif name in origins:
        _refuse(decision, name, f"it is set on the box by {origins[name]}, which wins")
    else:
        try:
            decision.settings[name] = convert(value, setting_types()[name], from_text=False)
        except BadValueError as error:
            _refuse(decision, name, f"{value!r:.70} does not fit: {error}")


def _judge_together(decision: Decision, local: Settings) -> None:
    """Keep all of the settings where they go together, or else each in turn that goes with those before it."""
    wanted = dict(decision.settings)
    if not _misfit(local, wanted):
        return
    decision.settings.clear()
    for name, value in wanted.items():
        if problem := _misfit(local, {**decision.settings, name: value}):
            _refuse(decision, name, problem)
        else:
            decision.settings[name] = value


def _misfit(local: Settings, values: Mapping[str, Any]) -> str:
    """Return why the values do not go together with the local ones, or nothing."""
    try:
        check_together(replace(local, **values))
    except SettingsError as error:
        return error.message
    return ""


def _judge_interval(decision: Decision, stream: str, interval_s: float) -> None:
    if stream not in STREAMS:
        _refuse(decision, f"telemetry.{stream}", f"there is no such stream, only {', '.join(STREAMS)}")
    elif interval_s != 0 and not SHORTEST_INTERVAL_S <= interval_s <= LONGEST_INTERVAL_S:
        bounds = f"0 or {SHORTEST_INTERVAL_S:g} to {LONGEST_INTERVAL_S:g}"
        _refuse(decision, f"telemetry.{stream}", f"{interval_s:g} s does not fit: it takes {bounds}")
    else:
        decision.telemetry[stream] = interval_s


def _refuse(decision: Decision, name: str, reason: str) -> None:
    """Note a refusal; a document full of nonsense is answered with its beginning."""
    if len(decision.refused) < MOST_REFUSALS:
        shown = name if len(name) <= MOST_NAME_CHARACTERS else f"{name[:MOST_NAME_CHARACTERS]}…"
        decision.refused[shown] = reason[:200]
