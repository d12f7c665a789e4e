"""The diagnostics bundle: what a person far away needs to see why a box is not well. No prompt, answer or secret.

It is JSON, gzipped (RFC 1952) and, since a reply is JSON, in Base64. What does not fit into a reply is in a file on the
box; the reply then has the newest log lines only, and says where the rest is.
"""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from appliance import __version__
from appliance.core.clock import Clock, iso_timestamp
from appliance.core.errors import ApplianceError
from appliance.core.fleet import ReportedModel
from appliance.core.settings import EffectiveSetting, Settings
from appliance.core.types import HealthSource
from appliance.observe.log_ring import LogRing
from appliance.observe.resources import disk, memory
from appliance.store.files import write_file

SECRET = frozenset({"mcp_servers", "sql_databases"})
"""Settings whose text may hold a password or the name of a customer's file."""

LIBRARIES = ("llama-cpp-python", "onnxruntime", "paho-mqtt", "tuf", "cryptography", "starlette", "uvicorn", "uvloop")
LARGEST_PACKED_BYTES = 44 * 1024
"""In Base64, with what is around it, this stays within a document's 64 KiB."""
FILE_NAME = "diagnostics.json.gz"


@dataclass(frozen=True, slots=True)
class DiagnosticsSources:
    """Where the bundle's parts come from."""

    settings: Settings
    effective: Sequence[EffectiveSetting]
    health: HealthSource
    models: Callable[[], list[ReportedModel]]
    log: LogRing
    clock: Clock


def diagnostics(sources: DiagnosticsSources) -> dict[str, Any]:
    """Return the bundle as a reply's result; blocks for as long as it takes to pack it, and to write what is too large.

    Raises:
        StorageError: It does not fit into a reply, and cannot be written either.
    """
    lines = sources.log.tail(1_000_000)
    bundle = _bundle(sources)
    packed = whole = _pack(bundle, lines)
    told: Sequence[str] = lines
    while len(packed) > LARGEST_PACKED_BYTES and told:
        told = told[len(told) // 2 + 1 :]
        packed = _pack(bundle, told)
    result = {
        "encoding": "base64+gzip+json",
        "bundle": base64.b64encode(packed).decode(),
        "lines": len(told),
        "lines_left_out": len(lines) - len(told),
    }
    if packed is not whole:
        path = sources.settings.data_dir / FILE_NAME
        write_file(path, whole, private=True)
        result["file"] = str(path)
    return result


def unpack(result: dict[str, Any]) -> dict[str, Any]:
    """Return what is in a reply's result."""
    content: dict[str, Any] = msgspec.json.decode(gzip.decompress(base64.b64decode(result["bundle"])))
    return content


def _pack(bundle: dict[str, Any], lines: Sequence[str]) -> bytes:
    log = [msgspec.Raw(each.encode()) for each in lines]
    return gzip.compress(msgspec.json.encode({**bundle, "log": log}), compresslevel=9, mtime=0)


def _bundle(sources: DiagnosticsSources) -> dict[str, Any]:
    health = sources.health.health()
    return {
        "at": iso_timestamp(sources.clock.unix()),
        "agent": __version__,
        "health": {"ready": health.ready, "reason": health.reason},
        "settings": {each.name: _shown(each) for each in sources.effective if each.origin != "default"},
        "versions": _versions(LIBRARIES),
        "resources": _resources(sources.settings),
        "models": sources.models(),
    }


def _shown(setting: EffectiveSetting) -> dict[str, Any]:
    value = setting.value
    shown = "(set)" if setting.name in SECRET else str(value) if isinstance(value, Path) else value
    return {"value": shown, "origin": setting.origin}


def _versions(libraries: Collection[str]) -> dict[str, str]:
    found = {}
    for each in libraries:
        try:
            found[each] = version(each)
        except PackageNotFoundError:
            found[each] = "not installed"
    return found


def _resources(settings: Settings) -> dict[str, Any]:
    main = memory()
    found: dict[str, Any] = {
        "load": os.getloadavg(),
        "memory": {"total": main.total, "available": main.available},
    }
    try:
        data = disk(settings.data_dir)
        found["disk"] = {"total": data.total, "free": data.free}
    except (OSError, ApplianceError) as error:
        found["disk"] = {"error": type(error).__name__}
    return found
