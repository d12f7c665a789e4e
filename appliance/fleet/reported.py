"""What a box tells of itself: facts that hardly ever change, and its models. What changes all the time is telemetry."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from appliance import __version__
from appliance.core.fleet import ReportedModel
from appliance.core.settings import Settings
from appliance.core.wishes import Wish
from appliance.fleet.hardware import hardware_class
from appliance.observe.resources import board_name, cpu_features, cpu_name, disk, gpus, memory, physical_cores
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry

LoadedNames = Callable[[], Collection[str]]
"""Returns the full names of the models in memory."""

MOST_MODELS = 150


def box_facts(settings: Settings) -> dict[str, Any]:
    """Return what this box is. May take seconds: it wakes a sleeping GPU driver."""
    found = gpus()
    features, board = cpu_features(), board_name()
    return {
        "hardware": hardware_class(platform.machine(), features, board, [each.name for each in found]),
        "cpu": cpu_name(),
        "cpu_features": sorted(features),
        "cores": physical_cores(),
        "board": board,
        "gpus": [{"name": each.name, "memory": each.memory} for each in found],
        "memory": memory().total,
        "disk": _disk(settings),
        "os": _operating_system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "agent": __version__,
        "supervised": is_supervised(os.environ),
        "utc_offset_s": time.localtime().tm_gmtoff,  # a rollout may be for the night where the box is
    }


def is_supervised(environment: Mapping[str, str]) -> bool:
    """Return whether systemd runs this process and starts it again when it ends."""
    return bool(environment.get("INVOCATION_ID") or environment.get("NOTIFY_SOCKET"))


def _disk(settings: Settings) -> int:
    try:
        return disk(settings.data_dir).total
    except OSError:
        return 0  # what cannot be looked at is told as none; telemetry and `doctor` say more


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return platform.system()


def reported_models(registry: Registry, loaded: Collection[str]) -> list[ReportedModel]:
    """Return every registered model and what is meant by its name; the newest come first, should there be too many."""
    wishes = registry.wishes()
    models = [each for each in registry.list() if not each.adapter]
    newest = {each.name: each.version for each in models}
    told = sorted(models, key=lambda each: each.created, reverse=True)[:MOST_MODELS]
    return [_reported(each, wishes.get(each.name), newest, loaded) for each in told]


def _reported(
    model: RegisteredModel, wish: Wish | None, newest: Mapping[str, str], loaded: Collection[str]
) -> ReportedModel:
    meant = newest[model.name] if wish is None else wish.meant
    on_trial = wish is not None and wish.state == "trial" and wish.version == model.version
    return ReportedModel(
        name=model.name,
        version=model.version,
        kind=model.kind,
        digest=model.files[0].sha256,
        loaded=model.full_name in loaded,
        status="trial" if on_trial else "active" if meant == model.version else "present",
    )
